"""The last events of a bus, kept in memory, and their replay into any bus."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tickbus._core import Event, _Tally
from tickbus.bus import EventBus
from tickbus.errors import ConfigError, ForkedError
from tickbus.pacing import LONGEST_GAP, Pacer

if TYPE_CHECKING:
    from typing import Self

    from tickbus.envelope import Envelope
    from tickbus.store import EventStore
    from tickbus.typed import TypedEventBus

__all__ = ["EventRecorder"]


class EventRecorder:
    """Keeps the last events of a bus: a subscription that overwrites its oldest.

    Publishing to a recorded bus costs what one more subscription costs, and reads the clock. The
    events stay alive as long as they are kept.

    Args:
        bus: The bus to record, from now on.
        n: The most events kept, at least 1.

    Raises:
        ConfigError: `n` is out of range, or larger than the capacity of a `broadcast` bus.
        Closed: The bus is closed.

    Example:
        >>> import tickbus
        >>> with tickbus.EventBus() as bus, EventRecorder(bus, 2) as recorder:
        ...     bus.publish_many(["a", "b", "c"], topic="letters")
        ...     [(kept.sequence, kept.event) for kept in recorder.get_events()]
        ...     recorder.lost
        3
        [(1, 'b'), (2, 'c')]
        1
    """

    def __init__(self, bus: EventBus[Any], n: int) -> None:
        self._subscription = bus.subscribe(
            capacity=n, policy="drop_oldest", on_lag="count", envelope=True
        )
        self._overwritten = _Tally()
        self._overwritten.add(self._subscription)
        self._lock = threading.Lock()
        self._kept: deque[Envelope[Any]] = deque(maxlen=n)
        self._pushed_out = 0

    @property
    def capacity(self) -> int:
        """The most events kept."""
        assert self._kept.maxlen is not None
        return self._kept.maxlen

    @property
    def lost(self) -> int:
        """Events published since the recording began that are not kept any more."""
        with self._lock:
            self._collect()
            return self._pushed_out + self._overwritten.read()[1]

    def get_events(self) -> list[Envelope[Any]]:
        """Returns the events kept, oldest first, each with its number, topic and time."""
        with self._lock:
            self._collect()
            return list(self._kept)

    def replay(
        self,
        bus: EventBus[Any] | TypedEventBus,
        speed: float = 0.0,
        *,
        longest_gap: float = LONGEST_GAP,
    ) -> int:
        """Publishes the events kept at this moment again, on their topics and in their order.

        It waits in this thread between them as long as they were apart when they were published,
        and as `publish` does where there is no room.

        Args:
            bus: Any bus, also the recorded one.
            speed: Recorded time per real time: 1 as recorded, 10 ten times faster, 0 flat out.
            longest_gap: Seconds of recorded time; gaps longer than this are not waited for.

        Returns:
            How many events were published.

        Raises:
            ConfigError: `speed` is below 0 or not finite.
            RuntimeError: `speed` is not 0 and the thread runs an event loop; use
                `asyncio.to_thread` there.
            Full, Closed: As `publish`; the events before have been published.
        """
        if not (math.isfinite(speed) and speed >= 0):
            raise ConfigError(f"speed was {speed!r}; it must be finite and at least 0")
        if speed > 0 and asyncio._get_running_loop() is not None:
            raise RuntimeError(
                "replay() with a speed would block this thread's running event loop; use "
                "asyncio.to_thread(recorder.replay, bus, speed) there"
            )
        pacer = Pacer(speed, longest_gap) if speed > 0 else None
        events = self.get_events()
        for envelope in events:
            if pacer is not None:
                pacer.wait_for(envelope.ts_publish)
            if isinstance(bus, EventBus):
                bus.publish(envelope.event, envelope.topic)
            else:
                bus.publish(envelope.event)
        return len(events)

    def write(self, store: EventStore) -> range:
        """Appends the events kept at this moment to a log, on their topics and in their order.

        Returns:
            Their sequences.

        Raises:
            TypeError: msgspec cannot encode one of them; those before it were stored.
            StoreError: As `EventStore.append`; the events before were stored.
        """
        first = following = store.stats().next_sequence
        for kept in self.get_events():
            topic = None if isinstance(kept.event, Event) else kept.topic
            following = store.append(kept.event, topic) + 1
        return range(first, following)

    def close(self) -> None:
        """Ends the recording; what was kept stays. Again does nothing."""
        with self._lock:
            self._collect()
            self._subscription.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        # A forked child leaves the recording to its parent, so that its own exception passes.
        with suppress(ForkedError):
            self.close()

    def _collect(self) -> None:
        """Takes over what is pending now, and no more: publishers may be quicker."""
        pending = islice(iter(self._subscription.try_recv, None), self._subscription.pending)
        for envelope in pending:
            self._pushed_out += len(self._kept) == self.capacity
            self._kept.append(envelope)
