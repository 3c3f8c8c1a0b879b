"""A log as a subscriber: what others publish is appended, by a thread of its own.

```
EventSystem ─► a thread of the core, without the global interpreter lock ─┐
                                                                          ├─► EventStore
EventBus ────► a Python thread, which encodes what it receives at once ───┘
```
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tickbus._core import Shutdown, _SystemSource, select
from tickbus.bus import EventBus
from tickbus.config import check_callable, check_seconds
from tickbus.errors import Closed, ForkedError, Lagged
from tickbus.system import EventSystem

if TYPE_CHECKING:
    from typing import Self

    from tickbus.envelope import Envelope
    from tickbus.store import EventStore
    from tickbus.typed import TypedEventBus

__all__ = ["Attachment", "Published", "detach_all", "none_attached"]

Published: TypeAlias = "EventSystem | EventBus[Any] | TypedEventBus"
"""What a store can be attached to."""

_LOGGER = logging.getLogger("tickbus")
_BATCH = 1_024


class Attachment:
    """A store that takes what a bus or a system publishes, made by `EventStore.attach`.

    `detach()`, the end of a `with` block and closing the store end it, after what is pending was
    stored; so does closing the source.
    """

    def __init__(
        self,
        store: EventStore,
        source: Published,
        on_detach: Callable[[Exception], object] | None,
    ) -> None:
        if on_detach is not None:
            check_callable("on_detach", on_detach, "a function that takes the error, or None")
        self._store = store
        self._source = _source(store, source)
        self._on_detach = on_detach
        self._failure: Exception | None = None
        self._process = os.getpid()
        self._has_ended = False
        # The interpreter does not wait for it, but ends it.
        self._thread = threading.Thread(target=self._run, name="tickbus-attach", daemon=True)
        self._thread.start()
        # It is known only now that others can wait for it. Whoever began to close the store before
        # did not see it; whoever begins now does.
        _running.add(self)
        if self._has_ended:
            _running.discard(self)
        if store in _closing or store.closed:
            self.detach()
            raise Closed("the log is closed; open it again")

    @property
    def stored(self) -> int:
        """Events that were appended."""
        return self._source.stored

    @property
    def missed(self) -> int:
        """Events that were not: where, the gaps in the log say, up to where the store failed.

        What the store had taken then and what was pending counts; what was published while it
        detached itself, or later, does not.
        """
        return self._source.missed

    @property
    def failure(self) -> Exception | None:
        """Why the store has detached itself; `None` if it has not."""
        return self._failure

    @property
    def attached(self) -> bool:
        """Whether it takes events still."""
        return self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it has ended, because the source was closed or the store failed.

        Args:
            timeout: The longest wait in seconds; `None` waits for ever.

        Returns:
            Whether it has ended; within `on_detach`, which its own thread calls, always so.

        Raises:
            ConfigError: The timeout is negative or not finite.
            ForkedError: It belongs to the process that this one was forked from.
        """
        check_seconds("timeout", timeout)
        if os.getpid() != self._process:
            raise ForkedError(
                "this belongs to the process that this one was forked from; wait for it there"
            )
        if self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def detach(self) -> None:
        """Stores what is pending and ends. Again does nothing.

        What others publish meanwhile may be stored or not.

        Raises:
            ForkedError: It belongs to the process that this one was forked from.
        """
        self._source.stop()
        # `on_detach` is called on the thread itself.
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        # A forked child leaves it to its parent.
        with suppress(ForkedError):
            self.detach()

    def __repr__(self) -> str:
        state = "" if self.attached else " detached"
        return f"<Attachment to {self._store!r}{state}>"

    def _run(self) -> None:
        try:
            self._source.run()
        except Exception as why:
            self._failure = why
            if self._on_detach is not None:
                _within.on_detach = True
                self._on_detach(why)
        finally:
            self._has_ended = True
            _running.discard(self)


_running: set[Attachment] = set()
_closing: list[EventStore] = []
_within = threading.local()


def detach_all(store: EventStore | None = None) -> None:
    """Ends the attachments of a store, or all that there are."""
    # One that has failed has nothing left to store, and its `on_detach` may wait for this one.
    is_one_of_them = getattr(_within, "on_detach", False)
    for attachment in list(_running):
        if store is not None and attachment._store is not store:
            continue
        if attachment.failure is None or not is_one_of_them:
            attachment.detach()


@contextmanager
def none_attached(store: EventStore) -> Iterator[None]:
    """Ends the attachments of a store, which is closed within, and refuses others meanwhile."""
    _closing.append(store)
    try:
        detach_all(store)
        yield
    finally:
        _closing.remove(store)


if hasattr(os, "register_at_fork"):
    # Their threads do not run in a child.
    os.register_at_fork(after_in_child=_running.clear)


class _Source(Protocol):
    """Where events come from."""

    @property
    def stored(self) -> int: ...
    @property
    def missed(self) -> int: ...
    def run(self) -> None:
        """Stores events until there will be no more, it is stopped, or the store fails."""

    def stop(self) -> None:
        """Has `run` end once it has stored what is pending."""


def _source(store: EventStore, source: Published) -> _Source:
    if isinstance(source, EventSystem):
        return _SystemSource(store, source)
    bus = source if isinstance(source, EventBus) else getattr(source, "bus", None)
    if isinstance(bus, EventBus):
        return _BusSource(store, bus)
    raise TypeError(
        f"source was {source!r}; it must be an EventSystem, an EventBus or a TypedEventBus"
    )


class _BusSource:
    """What a bus publishes, encoded many at once by the thread that runs it."""

    def __init__(self, store: EventStore, bus: EventBus[Any]) -> None:
        # Whoever may not append is told before anybody waits for it.
        store.append_many(())
        self._store = store
        self._subscription = bus.subscribe(
            policy="drop_oldest" if bus.backend == "broadcast" else "block", envelope=True
        )
        self._subscription._feed_store()
        self._shutdown = Shutdown()
        self._has_warned = False
        # Events that were taken, of which there is nothing in the log.
        self._taken = 0
        self.stored = 0
        self.missed = 0

    def run(self) -> None:
        try:
            self._follow()
            self._drain()
        except Exception:
            lost = self._taken + self._subscription.pending
            self.missed += lost
            self._store._count_detached(lost)
            raise
        finally:
            self._subscription.close()

    def stop(self) -> None:
        self._shutdown.set()

    def _follow(self) -> None:
        """Stores what comes, until it is stopped or the bus is closed."""
        while not self._shutdown.is_set():
            if select([self._subscription], self._shutdown) is None:
                continue
            try:
                delivered = self._subscription.recv_many(_BATCH)
            except Lagged as hole:
                self._miss(hole)
            except Closed:
                return
            else:
                self._append(delivered)

    def _drain(self) -> None:
        """Stores what is pending now, and no more: publishers may be quicker."""
        # One more, for what was missed behind the last one.
        left = self._subscription.pending + 1
        while left > 0:
            try:
                delivered = self._subscription.try_recv()
            except Lagged as hole:
                self._miss(hole)
                continue
            except Closed:
                return
            if delivered is None:
                return
            self._append([delivered])
            left -= 1

    def _miss(self, hole: Lagged) -> None:
        self._taken = hole.missed
        self._store.append_gap(hole.missed, hole.exact)
        self._taken = 0
        self.missed += hole.missed

    def _append(self, delivered: list[Envelope[Any]]) -> None:
        # What a replay publishes is in a log already.
        delivered = [envelope for envelope in delivered if not envelope.replayed]
        self._taken = len(delivered)
        stored, gaps, why, failure = self._store._append_delivered(delivered)
        self._taken -= stored + gaps
        self.stored += stored
        self.missed += gaps
        if failure is not None:
            raise failure
        if why is not None and not self._has_warned:
            self._has_warned = True
            _LOGGER.warning(
                "%r has a gap for each event that it cannot hold; the first one: %s",
                self._store,
                why,
            )
