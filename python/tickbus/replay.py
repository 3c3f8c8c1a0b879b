"""Replay: what a log or a capture has, published again in its order and at its pace.

```
EventStore, folder of a log ─┐                          ┌─► EventSystem: a thread without the GIL
capture: as compact events ──┴─► Replay, its Transport ─┼─► EventBus, TypedEventBus
                                 pause, step, seek      └─► batches(): arrays, in your own thread
```
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from tickbus import _core
from tickbus._core import EventBatch, VirtualClock
from tickbus.bus import EventBus
from tickbus.config import check_seconds
from tickbus.errors import Closed, ConfigError, ForkedError
from tickbus.pacing import LONGEST_GAP
from tickbus.records import Record, decoder
from tickbus.store import EventStore, _check_log
from tickbus.system import EventSystem

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import NDArray

    from tickbus.typed import TypedEventBus

__all__ = ["Replay", "ReplayProgress"]

_Wanted: TypeAlias = str | int | Iterable[str | int]


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """The numbers of a replay at one moment.

    Attributes:
        state: `ready` before it began, `running`, `paused`, `ended` when everything was replayed,
            `stopped` if it was told to stop or could not go on.
        replayed: Records that were replayed.
        sequence: The sequence of the next record.
        missed: Events that the log says were lost on the way into it, or were removed since. They
            are known only where all of a log is replayed.
        skipped_gaps: Gaps in time that were not waited for.
    """

    state: str
    replayed: int
    sequence: int
    missed: int
    skipped_gaps: int


class Replay:
    """Publishes again what a log or a capture has, once: make another one to do it again.

    What is replayed is what the log has when the replay begins. Everybody gets all of it, however
    slow: the replay waits for each subscription that has no room, but for those that conflate or
    are made with `on_lag="count"`. Replayed events say so: `Event.replayed`, `Envelope.replayed`.
    Behind the last one comes an event of the type `EventType.ReplayEnded`, whose topic is
    `replay_ended` and whose `metadata` is the number of records.

    A capture is replayed as the compact events that `tickbus record` makes of it, which are all
    read into memory first.

    Args:
        source: An `EventStore`, the folder of a log, which another process may be writing, or the
            file of a capture.
        format: The capture's format, one of `tickbus.captures.FORMATS`; `None` recognizes it.
        clock: The clock that it moves; `None` makes one. A bus that was made with a `VirtualClock`
            has its own moved.

    Raises:
        ConfigError: A format was given for a log, or there is no such format.
        StoreError: The folder holds no log.

    Example:
        >>> import tempfile
        >>> from tickbus import EventBus, EventStore, Replay
        >>> folder = tempfile.TemporaryDirectory()
        >>> with EventStore.open(folder.name) as store, EventBus() as bus:
        ...     _ = store.append_many([{"n": 1}, {"n": 2}], topic="notes")
        ...     notes = bus.subscribe("notes")
        ...     replay = Replay(store).into(bus)
        ...     notes.recv(), notes.recv()
        ...     replay.wait().replayed
        ({'n': 1}, {'n': 2})
        2
        >>> folder.cleanup()
    """

    def __init__(
        self,
        source: EventStore | str | os.PathLike[str],
        *,
        format: str | None = None,
        clock: VirtualClock | None = None,
    ) -> None:
        self._source: EventStore | Path
        self._format = format
        self._is_capture = False
        if isinstance(source, EventStore):
            self._source = source
        else:
            self._source = Path(source)
            self._is_capture = self._source.is_file()
            if not self._is_capture:
                _check_log(self._source)
        if format is not None:
            if not self._is_capture:
                raise ConfigError(f"format was {format!r}; a log has its own: leave it out")
            # Imported only here, as in `_events`.
            from tickbus.captures import check_format

            check_format(format)
        self._clock = VirtualClock() if clock is None else clock
        self._transport = _core._Transport()
        self._sequences: range | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def clock(self) -> VirtualClock:
        """The clock, which shows the time of what was published last.

        Handlers in other threads and tasks may be behind it; the `ts_publish` of an envelope is
        what it showed, where the bus was made with it.
        """
        return self._clock

    @property
    def state(self) -> str:
        """`ready`, `running`, `paused`, `ended` or `stopped`: see `ReplayProgress`."""
        return self.progress.state

    @property
    def progress(self) -> ReplayProgress:
        """The numbers of this moment."""
        state, *numbers = self._transport.progress()
        is_ready = self._sequences is None and state != "stopped"
        return ReplayProgress("ready" if is_ready else state, *numbers)

    @property
    def sequences(self) -> range | None:
        """The sequences of all that the source has; `None` before the replay has begun."""
        return self._sequences

    @property
    def digest(self) -> str:
        """What was replayed so far, as 32 hexadecimal digits: XXH3 over contents and order.

        Equal for equal records in equal order, whatever process replays them, from whatever log,
        and however fast. It tells replays apart, and does not withstand whoever makes up events.
        `docs/format.md` says which bytes it is of.
        """
        return self._transport.digest()

    def into(
        self,
        bus: EventBus[Any] | TypedEventBus | EventSystem,
        speed: float = 0.0,
        *,
        start: int | None = None,
        stop: int | None = None,
        types: _Wanted | None = None,
        symbols: _Wanted | None = None,
        mixed: bool = False,
        longest_gap: float = LONGEST_GAP,
    ) -> Self:
        """Begins to publish, in a thread of its own, and returns this replay.

        Args:
            bus: An `EventSystem` takes compact events, which are published without the global
                interpreter lock; an `EventBus` or a `TypedEventBus` everything, on its topic.
            speed: Recorded time per real time: 1 as recorded, 10 ten times faster, 0 as fast as
                it goes.
            start: The lowest timestamp that is wanted, in ns since the Unix epoch, UTC.
            stop: The timestamp before which they are.
            types: Event types that are wanted, by name or code. Objects have none.
            symbols: Symbols that are wanted, by name or number. Objects have none either.
            mixed: Whether stores may be attached to the bus, which leave out what is replayed, and
                others may publish into it.
            longest_gap: Seconds of recorded time; longer gaps are not waited for.

        Raises:
            ReplayRefused: The bus is not the replay's alone, and `mixed` is false.
            ConfigError: An argument is out of range, or the replay has begun already.
            Closed: The store is closed.
            ParseError, OSError: The capture cannot be read.
            InexactError: A price or a size of the capture does not fit into a compact event.
            StoreError: The log cannot be read.
        """
        target: EventSystem | EventBus[Any]
        target = bus if isinstance(bus, (EventSystem, EventBus)) else _bus_of(bus)
        clock = None if isinstance(target, EventSystem) else target.clock
        if isinstance(clock, VirtualClock):
            self._clock = clock
        core = self._begin(speed, longest_gap, start, stop, types, symbols, mixed=mixed)
        core.begin(target)

        def publish() -> None:
            if isinstance(target, EventSystem):
                core.publish_to_system(target)
            else:
                core.publish_to_bus(target, decoder)

        # The interpreter does not wait for it, but ends it.
        self._thread = threading.Thread(
            target=self._run, args=(publish,), name="tickbus-replay", daemon=True
        )
        _running.add(self)
        self._thread.start()
        return self

    def batches(
        self,
        speed: float = 0.0,
        *,
        start: int | None = None,
        stop: int | None = None,
        types: _Wanted | None = None,
        symbols: _Wanted | None = None,
        longest_gap: float = LONGEST_GAP,
    ) -> Iterator[NDArray[Any] | list[Record]]:
        """Begins, and returns an iterator of what is due, as much at once as there is.

        Compact events come as read-only arrays of shape (n,) with the dtype `tickbus.EVENT_DTYPE`,
        objects as lists of records. The iterator waits in the caller's thread for what is due;
        `stop()` from another one ends it. The clock shows the latest time of the batch.

        Args:
            speed: As for `into`.
            start: As for `into`.
            stop: As for `into`.
            types: As for `into`.
            symbols: As for `into`.
            longest_gap: As for `into`.

        Raises:
            ConfigError, Closed, ParseError, OSError, InexactError, StoreError: As `into`.
        """
        core = self._begin(speed, longest_gap, start, stop, types, symbols, mixed=True)
        due = self._due(core)
        return (batch.to_numpy() if isinstance(batch, EventBatch) else batch for batch in due)

    def read(
        self,
        start: int | None = None,
        stop: int | None = None,
        types: _Wanted | None = None,
        symbols: _Wanted | None = None,
    ) -> Iterator[EventBatch | list[Record]]:
        """As `batches`, as fast as it goes, without NumPy: events come as an `EventBatch`.

        Args:
            start: As for `into`.
            stop: As for `into`.
            types: As for `into`.
            symbols: As for `into`.

        Raises:
            ConfigError, Closed, ParseError, OSError, InexactError, StoreError: As `into`.
        """
        return self._due(self._begin(0.0, LONGEST_GAP, start, stop, types, symbols, mixed=True))

    def pause(self) -> None:
        """Publishes nothing from now on, but for what is on its way; also before it has begun.

        Raises:
            Closed: It is over.
        """
        _check(self._transport.pause())

    def resume(self) -> None:
        """Goes on after `pause` or `step`.

        Raises:
            Closed: It is over.
        """
        _check(self._transport.resume())

    def step(self, records: int = 1) -> None:
        """Publishes so many more records at once, whatever the speed, and pauses.

        Raises:
            Closed: It is over.
        """
        _check(self._transport.step(records))

    def seek(self, time: int) -> None:
        """Goes on, forth or back, as if the replay had begun with this `start`.

        A paused replay stays paused. The digest goes on over what was published.

        Args:
            time: In ns since the Unix epoch, UTC.

        Raises:
            Closed: It is over.
        """
        _check(self._transport.seek(time))

    def stop(self) -> None:
        """Ends it, also where it waits. Again does nothing."""
        self._transport.stop()

    def wait(self, timeout: float | None = None) -> ReplayProgress:
        """Waits until it is over, and returns its numbers; after the timeout, those of then.

        Args:
            timeout: The longest wait in seconds; `None` waits for ever.

        Raises:
            BusError: Why it could not go on: the bus or the store was closed, others published
                into the bus, or the log is damaged.
            ConfigError: The timeout is negative or not finite, or the replay has not begun.
            RuntimeError: The thread runs an event loop; await the replay there.
        """
        check_seconds("timeout", timeout)
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("wait() would block this thread's running event loop; use await")
        self._check_begun()
        if self._thread is not None:
            self._thread.join(timeout)
        return self._result()

    def __await__(self) -> Generator[Any, None, ReplayProgress]:
        return self._wait_async().__await__()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        # A forked child leaves the replay to its parent.
        with suppress(ForkedError):
            self.stop()
            if self._thread is not None:
                self._thread.join()

    def __repr__(self) -> str:
        return f"<Replay of {self._source} {self.state}>"

    def _begin(
        self,
        speed: float,
        longest_gap: float,
        start: int | None,
        stop: int | None,
        types: _Wanted | None,
        symbols: _Wanted | None,
        *,
        mixed: bool,
    ) -> _core._Replay:
        if self._sequences is not None:
            raise ConfigError("this replay has begun already; make another one")
        if self._transport.progress()[0] == "stopped":
            raise _over()
        core = _core._Replay(
            self._events() if self._is_capture else self._source,
            self._transport,
            self._clock,
            speed=speed,
            longest_gap=longest_gap,
            start=start,
            stop=stop,
            types=types,
            symbols=symbols,
            mixed=mixed,
        )
        self._sequences = range(*core.sequences)
        return core

    def _check_begun(self) -> None:
        if self.state == "ready":
            raise ConfigError("this replay has not begun; call into() first")

    def _events(self) -> EventBatch:
        """Returns the compact events of the capture."""
        # Few replay captures, and their readers need much of the standard library.
        from tickbus.captures import read_capture
        from tickbus.compact import compact, register

        assert isinstance(self._source, Path)
        register()
        messages = read_capture(self._source, self._format)
        return EventBatch([event for message in messages for event in compact(message)])

    def _due(self, core: _core._Replay) -> Iterator[EventBatch | list[Record]]:
        try:
            while (due := core.next_batch()) is not None:
                if isinstance(due, EventBatch):
                    yield due
                else:
                    yield [
                        Record(sequence, timestamp, topic, decoder(schema, version)(content), False)
                        for sequence, timestamp, topic, schema, version, content in due
                    ]
        finally:
            self._transport.stop()

    def _run(self, publish: Callable[[], None]) -> None:
        try:
            publish()
        except BaseException as why:
            self._failure = why
        finally:
            self._transport.stop()
            with self._lock:
                waiting, self._waiting = self._waiting, []
                _running.discard(self)
            for loop, future in waiting:
                # A loop that is closed waits for nothing.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(_resolve, future)

    async def _wait_async(self) -> ReplayProgress:
        self._check_begun()
        loop = asyncio.get_running_loop()
        with self._lock:
            if self in _running:
                future: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, future))
            else:
                return self._result()
        await future
        return self._result()

    def _result(self) -> ReplayProgress:
        if self._failure is not None:
            raise self._failure
        return self.progress


_running: weakref.WeakSet[Replay] = weakref.WeakSet()


def _check(is_taken: bool) -> None:
    if not is_taken:
        raise _over()


def _over() -> Closed:
    return Closed("the replay is over; make another one")


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _bus_of(bus: object) -> EventBus[Any]:
    """Returns the bus below a typed one."""
    below = getattr(bus, "bus", None)
    if isinstance(below, EventBus):
        return below
    raise TypeError(f"bus was {bus!r}; it must be an EventSystem, an EventBus or a TypedEventBus")


@atexit.register
def _end_all() -> None:
    """Ends all replays before the interpreter ends their threads."""
    for replay in list(_running):
        replay.stop()
        if replay._thread is not None:
            replay._thread.join()


if hasattr(os, "register_at_fork"):
    # Their threads do not run in a child.
    os.register_at_fork(after_in_child=_running.clear)
