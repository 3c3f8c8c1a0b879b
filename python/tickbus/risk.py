"""Risk events: events that nobody may miss, delivered until each consumer has acknowledged them.

```
publish_critical ─► durable ─► each registered consumer ─► ack: settled
                                   │  ▲                └─► nack, exception, lease over: again later
                                   │  └─ the next one of its key waits
                                   └─► too old: escalated ─► too many attempts: a dead letter
```

What is acknowledged, and how often what was tried, is durable; after a restart everything goes on
where it was. An event may be delivered more than once, never not at all. For effects that happen
exactly once, write the event's id into the same transaction as the effect, under a unique
constraint.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from tickbus import _core
from tickbus.config import check_callable, check_seconds
from tickbus.errors import AckTimeout, BusError, Closed, ForkedError, ReceiveTimeout
from tickbus.records import decoder

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from tickbus.envelope import Clock
    from tickbus.store import EventStore

__all__ = [
    "ConsumerStats",
    "CriticalDelivery",
    "DeadLetter",
    "Escalation",
    "FailedAttempt",
    "RiskConsumer",
    "RiskEventSystem",
    "RiskStats",
    "TooManyInFlight",
]

_log = logging.getLogger("tickbus")


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed.

    Attributes:
        attempt: Its number, from 1.
        reason: What the consumer said, the exception of its handler, or what happened instead.
    """

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Escalation:
    """A consumer has not acknowledged an event in time, or has failed for the last time.

    Attributes:
        event_id: The event.
        consumer: The consumer; `None` if none was registered when the event was published.
        attempts: How often it was given the event so far.
    """

    event_id: int
    consumer: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that a consumer gets no more, unless `redeliver` says so.

    Attributes:
        event_id: The event; the log keeps it.
        consumer: The consumer; `None` if none was registered when the event was published.
        key: Its key.
        reason: Why: what was said of the last attempt.
        attempts: The attempts that failed, in order.
        event: The event itself.
    """

    event_id: int
    consumer: str | None
    key: str | None
    reason: str
    attempts: tuple[FailedAttempt, ...]
    event: Any


@dataclass(frozen=True, slots=True)
class TooManyInFlight:
    """A consumer has as many events as it may; it gets more once it acknowledges some.

    Attributes:
        consumer: The consumer.
        in_flight: Events that it has.
    """

    consumer: str
    in_flight: int


@dataclass(frozen=True, slots=True)
class ConsumerStats:
    """Numbers of a consumer at one moment.

    Attributes:
        name: Its name.
        ordered: Whether events of a key wait for one another.
        pending: Events that it has not acknowledged, those in flight included.
        in_flight: Events that it has been given.
    """

    name: str
    ordered: bool
    pending: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class RiskStats:
    """Numbers of a risk system at one moment, since it was opened unless they say otherwise.

    Attributes:
        published: Events.
        acked: Acknowledgments.
        failed: Attempts that failed.
        escalated: Escalations.
        dead_lettered: Events that became dead letters.
        limited: How often a consumer had as many events as it may, and more were there.
        refused: Events that the log refused, so that they were delivered live.
        dead_letters: Dead letters that there are now.
        consumers: A row for each consumer, those without a handler here included.
    """

    published: int
    acked: int
    failed: int
    escalated: int
    dead_lettered: int
    limited: int
    refused: int
    dead_letters: int
    consumers: tuple[ConsumerStats, ...]


class CriticalDelivery:
    """An event that a consumer has been given: `ack` or `nack` it before the lease ends.

    Attributes:
        event_id: The event: its sequence in the log; `None` of one that was delivered live.
        attempt: How often it was given to this consumer, from 1; 0 of one that was delivered live.
        key: Its key.
        event: The event.
    """

    __slots__ = ("_consumer", "_id", "attempt", "event", "key")

    def __init__(self, consumer: _core._RiskConsumer, row: _core._DeliveryRow) -> None:
        self._consumer = consumer
        self._id, self.attempt, self.key, event = row
        self.event: Any = _decoded(event)

    @property
    def event_id(self) -> int | None:
        """The event: its sequence in the log; `None` of one that was delivered live."""
        return None if self.live else self._id

    @property
    def live(self) -> bool:
        """Whether the log refused it, so that it is delivered once and needs no acknowledgment."""
        return self.attempt == 0

    def ack(self) -> None:
        """Acknowledges the event durably: this consumer never gets it again.

        Raises:
            StaleToken: It was delivered again since, or is settled.
            StoreFull, Poisoned, StoreIO, Closed: It may be delivered again.
        """
        self._consumer.ack(self._id, self.attempt)

    async def ack_async(self) -> None:
        """As `ack`, without a thread that waits for the disk. Cancelling takes nothing back.

        Raises:
            StaleToken, StoreFull, Poisoned, StoreIO, Closed: As `ack`.
        """
        await self._consumer.ack_async(self._id, self.attempt)

    def nack(self, reason: str) -> None:
        """Says durably that the attempt has failed: it is tried again later, or a dead letter.

        Args:
            reason: Why; 1,024 bytes of it are kept.

        Raises:
            StaleToken, StoreFull, Poisoned, StoreIO, Closed: As `ack`.
        """
        self._consumer.nack(self._id, self.attempt, reason)

    async def nack_async(self, reason: str) -> None:
        """As `nack`, without a thread that waits for the disk. Cancelling takes nothing back.

        Raises:
            StaleToken, StoreFull, Poisoned, StoreIO, Closed: As `ack`.
        """
        await self._consumer.nack_async(self._id, self.attempt, reason)

    def __repr__(self) -> str:
        key = "" if self.key is None else f" key={self.key!r}"
        what = "live" if self.live else f"event_id={self._id} attempt={self.attempt}"
        return f"<CriticalDelivery {what}{key}>"


Handler: TypeAlias = Callable[[CriticalDelivery], Awaitable[None] | None]
"""Handles an event: returning acknowledges it, raising an `Exception` is a failure."""


_AsyncHandler: TypeAlias = Callable[[CriticalDelivery], Awaitable[None]]


class RiskConsumer:
    """A consumer of risk events, made by `RiskEventSystem.register`.

    Iterating, also by `async for`, gives deliveries until the system is closed. Several threads and
    tasks may take from it: each event goes to one of them.
    """

    __slots__ = ("_core", "name")

    def __init__(self, core: _core._RiskConsumer, name: str) -> None:
        self._core = core
        self.name = name

    def take(self, timeout: float | None = None) -> CriticalDelivery:
        """Waits for the next event, and returns it once this attempt was counted durably.

        Args:
            timeout: The longest wait in seconds; `None` waits until the system is closed.

        Raises:
            ReceiveTimeout: There was none in time.
            Closed: The system is closed, or the consumer was removed.
            StoreFull, Poisoned, StoreIO: The attempt cannot be counted; events that the log
                refuses are taken all the same.
            Corrupt: The event is damaged.
            RuntimeError: The thread runs an event loop.
        """
        row = self._core.take(timeout)
        if row is None:
            raise ReceiveTimeout(
                f"the consumer {self.name!r} got no event within {timeout} s; take again"
            )
        return CriticalDelivery(self._core, row)

    def try_take(self) -> CriticalDelivery | None:
        """Returns the next event, or `None` if there is none now.

        Raises:
            Closed, StoreFull, Poisoned, StoreIO, Corrupt: As `take`.
        """
        row = self._core.try_take()
        return None if row is None else CriticalDelivery(self._core, row)

    async def take_async(self) -> CriticalDelivery:
        """As `take`, in a task. Cancelling it loses nothing, but the attempt may count.

        Raises:
            Closed, StoreFull, Poisoned, StoreIO, Corrupt: As `take`.
        """
        return CriticalDelivery(self._core, await self._core.take_async())

    def __iter__(self) -> Iterator[CriticalDelivery]:
        while True:
            try:
                delivery = self.take()
            except ForkedError:
                raise
            except Closed:
                return
            yield delivery

    async def __aiter__(self) -> AsyncIterator[CriticalDelivery]:
        while True:
            try:
                delivery = await self.take_async()
            except ForkedError:
                raise
            except Closed:
                return
            yield delivery

    def __repr__(self) -> str:
        return f"<RiskConsumer {self.name}>"


class RiskEventSystem:
    """Delivers events that nobody may miss, over an event log that is open for writing.

    Args:
        store: The log. Each has one risk system at a time.
        lease: How long a consumer may have an event before that attempt has failed, in seconds.
        max_attempts: Attempts before an event becomes a dead letter, from 1 to 512.
        retry_base: The longest wait after the first attempt that failed, in seconds; it doubles
            with each further one. Waits are drawn from 0 to that.
        retry_cap: The longest wait after any attempt, in seconds.
        escalate_after: An event that a consumer has not acknowledged at this age, in seconds, is
            escalated; after a restart ages count anew.
        max_in_flight: Events that a consumer may have at a time.
        seed: What waits are drawn from; `None` is another one each time.
        clock: What tells the time; `None` is the system's monotonic clock. After one of your own
            has advanced, call `check_deadlines`.
        escalate: Called with each `Escalation`, by a thread of the system.
        on_dead_letter: Called with each new `DeadLetter`, by the same thread.
        on_limit: Called when a consumer has `TooManyInFlight`, by the same thread.

    Attributes:
        path: The folder of the log.
        max_in_flight: Events that a consumer may have at a time.

    Raises:
        ConfigError: An argument is out of range, or the log has a risk system already.
        Corrupt: What says how far consumers are is damaged.
        StoreIO, StoreFull, ReadOnly, Closed: As `EventStore.append`.

    Example:
        >>> import tempfile
        >>> from tickbus import EventStore, RiskEventSystem
        >>> folder = tempfile.TemporaryDirectory()
        >>> with EventStore.open(folder.name) as store, RiskEventSystem(store) as risk:
        ...     _ = risk.register("limits", lambda delivery: print(delivery.event))
        ...     event_id = risk.publish_critical({"reduce": "BTCUSDT"}, key="account 7")
        ...     risk.wait_ack(event_id, timeout=10)
        {'reduce': 'BTCUSDT'}
        True
        >>> folder.cleanup()
    """

    __slots__ = ("__weakref__", "_core", "_tasks", "_threads", "max_in_flight", "path")

    def __init__(
        self,
        store: EventStore,
        *,
        lease: float = 30.0,
        max_attempts: int = 10,
        retry_base: float = 0.1,
        retry_cap: float = 30.0,
        escalate_after: float = 5.0,
        max_in_flight: int = 1_000,
        seed: int | None = None,
        clock: Clock | None = None,
        escalate: Callable[[Escalation], object] | None = None,
        on_dead_letter: Callable[[DeadLetter], object] | None = None,
        on_limit: Callable[[TooManyInFlight], object] | None = None,
    ) -> None:
        if clock is not None:
            check_callable("clock.time_ns", getattr(clock, "time_ns", None))
        for name, told in (
            ("escalate", escalate),
            ("on_dead_letter", on_dead_letter),
            ("on_limit", on_limit),
        ):
            if told is not None:
                check_callable(name, told)
        self._core = _core._RiskSystem(
            store,
            lease,
            max_attempts,
            retry_base,
            retry_cap,
            escalate_after,
            max_in_flight,
            seed,
            clock,
        )
        self.max_in_flight = max_in_flight
        self.path = store.path
        self._threads = _Threads()
        # Each with a future that is done once it has ended or waits in `aclose`.
        self._tasks: dict[asyncio.Task[None], asyncio.Future[None]] = {}
        if escalate or on_dead_letter or on_limit:
            arguments = (self._core, escalate, on_dead_letter, on_limit)
            self._threads.start("tickbus-risk-notices", _tell, *arguments)

    def publish_critical(
        self, event: object, *, key: str | None = None, topic: str | None = None
    ) -> int:
        """Publishes an event, and returns its id once it is durable: its sequence in the log.

        From then on it is delivered to each consumer that is registered. Without any it is
        escalated at once and becomes a dead letter.

        Args:
            event: A compact `Event`, a typed event, or anything else that msgspec encodes but
                `None`.
            key: Events of a key are delivered to each ordered consumer one after another.
            topic: The topic of a typed event or an object; that of a compact event is its own.

        Raises:
            TypeError, ConfigError: As `EventStore.append`; nothing was stored or delivered.
            ConfigError: A replay has published it, which makes nobody act.
            StoreFull, Poisoned, StoreIO, StoreError: It is not durable; `.delivered_live` consumers
                of this process get it all the same, once.
            Closed: The system is closed.
            RuntimeError: The thread runs an event loop.
        """
        return self._core.publish_critical(event, key, topic)

    async def publish_critical_async(
        self, event: object, *, key: str | None = None, topic: str | None = None
    ) -> int:
        """As `publish_critical`, without a thread that waits for the disk.

        Cancelled in the middle, the event may be delivered or not.

        Raises:
            TypeError, ConfigError, StoreFull, Poisoned, StoreIO, StoreError, Closed: As
                `publish_critical`.
        """
        return await self._core.publish_critical_async(event, key, topic)

    def register(
        self, consumer: str, handler: Handler | None = None, *, ordered: bool = True
    ) -> RiskConsumer:
        """Registers a consumer durably: from now on it gets each event until it acknowledges it.

        Registered again, as after a restart, it goes on where it was.

        Args:
            consumer: Its name, at most 255 bytes.
            handler: Called with each `CriticalDelivery`, one at a time: by a thread of the system,
                or, if it is a coroutine function, by a task of the running loop. Returning
                acknowledges the event, raising an `Exception` is a failure with its text, and so is
                `sys.exit()` in a thread. Without one, take from what is returned.
            ordered: Whether each event of a key waits until the one before is acknowledged, or a
                dead letter.

        Raises:
            ConfigError: Nothing can be named so.
            TypeError: The handler cannot be called.
            RuntimeError: The handler is a coroutine function, and no loop runs here.
            StoreFull, Poisoned, StoreIO, Closed: It is not registered.
        """
        if handler is not None:
            check_callable("handler", handler)
        is_async = handler is not None and _is_async(handler)
        loop = asyncio.get_running_loop() if is_async else None
        registered = RiskConsumer(self._core.register(consumer, ordered), consumer)
        if loop is not None and handler is not None:
            handling = _handle_async(registered, cast("_AsyncHandler", handler))
            task = loop.create_task(handling, name=f"tickbus-risk-{consumer}")
            tasks = self._tasks
            tasks[task] = loop.create_future()
            task.add_done_callback(lambda task: _resolve(tasks.pop(task)))
        elif handler is not None:
            self._threads.start(f"tickbus-risk-{consumer}", _handle, registered, handler)
        return registered

    def unregister(self, consumer: str) -> bool:
        """Removes a consumer durably, and returns whether there was one.

        What it has not acknowledged becomes dead letters, and those that take from it get `Closed`.

        Raises:
            StoreFull, Poisoned, StoreIO, Closed: It is not removed.
        """
        return self._core.unregister(consumer)

    def wait_ack(self, event_id: int, timeout: float | None = None) -> bool:
        """Waits until each consumer has acknowledged an event durably.

        Args:
            event_id: What `publish_critical` returned.
            timeout: The longest wait in seconds; `None` is for ever.

        Returns:
            True if each has, false if the event is a dead letter and nobody gets it any more.

        Raises:
            AckTimeout: Somebody has not acknowledged it in time; it is still delivered.
            ConfigError: No such event was published, or the timeout is negative or not finite.
            Closed: The system is closed.
            RuntimeError: The thread runs an event loop.
        """
        is_acked = self._core.wait_ack(event_id, timeout)
        if is_acked is None:
            raise self._ack_timeout(event_id, timeout)
        return is_acked

    async def wait_ack_async(self, event_id: int, timeout: float | None = None) -> bool:
        """As `wait_ack`, in a task.

        Raises:
            AckTimeout, ConfigError, Closed: As `wait_ack`.
        """
        check_seconds("timeout", timeout)
        try:
            async with asyncio.timeout(timeout):
                return await self._core.wait_ack_async(event_id)
        except TimeoutError as late:
            raise self._ack_timeout(event_id, timeout) from late

    def _ack_timeout(self, event_id: int, timeout: float | None) -> AckTimeout:
        attempts = self._core.attempts(event_id) or 0
        message = (
            f"event {event_id} was not acknowledged within {timeout} s, after {attempts} attempts; "
            "it is still delivered: wait again"
        )
        return AckTimeout(message, event_id, attempts)

    def dead_letters(self) -> list[DeadLetter]:
        """Returns the dead letters in the order of their events.

        Raises:
            Corrupt, StoreIO: One of the events cannot be read.
        """
        return [_letter(self._core, row) for row in self._core.dead_letters()]

    def redeliver(self, letter: DeadLetter) -> None:
        """Has a dead letter be delivered again, as if it was published now.

        Its consumer gets it, or each one if it has none.

        Raises:
            TypeError: It is no `DeadLetter`.
            ConfigError: There is no such dead letter any more, or nobody to get it.
            StoreFull, Poisoned, StoreIO, Closed: It stays a dead letter.
        """
        self._core.redeliver(*_named(letter))

    def discard(self, letter: DeadLetter) -> None:
        """Drops a dead letter durably: nobody gets its event, which the log may lose.

        Raises:
            TypeError: It is no `DeadLetter`.
            ConfigError: There is no such dead letter any more.
            StoreFull, Poisoned, StoreIO, Closed: It stays a dead letter.
        """
        self._core.discard(*_named(letter))

    def check_deadlines(self) -> None:
        """Does what is due by now; only a clock of one's own needs it, after it has advanced."""
        self._core.check_deadlines()

    def stats(self) -> RiskStats:
        """Returns the numbers of this moment."""
        row = self._core.stats()
        return RiskStats(*row[:8], tuple(ConsumerStats(*consumer) for consumer in row[8]))

    @property
    def closed(self) -> bool:
        """Whether it was closed, or its log was."""
        return self._core.closed

    def close(self) -> None:
        """Ends delivery in this process, after handlers have returned. Again does nothing.

        Those that wait get `Closed`. What is not acknowledged is delivered when the log has a risk
        system again. A handler that calls it waits neither for itself nor for others that do.
        """
        self._core.close()
        self._threads.join()

    async def aclose(self) -> None:
        """As `close`, and waits until tasks with handlers have ended; the loop runs meanwhile.

        A handler that calls it waits neither for itself nor for others that do.
        """
        this = cast("asyncio.Task[None]", asyncio.current_task())
        if is_handler := this in self._tasks:
            _resolve(self._tasks[this])
        await asyncio.to_thread(self.close)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()) if is_handler else list(self._tasks))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<RiskEventSystem{' closed' if self.closed else ''}>"


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Threads:
    """The threads of a system, which call handlers until it is closed."""

    __slots__ = ("_changed", "_joining", "_running")

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[threading.Thread] = set()
        self._joining: set[threading.Thread] = set()

    def start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        # A process that ends does not wait for handlers: what they have is delivered again.
        thread = threading.Thread(
            target=self._run, args=(target, *arguments), name=name, daemon=True
        )
        with self._changed:
            thread.start()
            self._running.add(thread)

    def _run(self, target: Callable[..., None], *arguments: object) -> None:
        try:
            target(*arguments)
        finally:
            with self._changed:
                self._running.remove(threading.current_thread())
                self._joining.discard(threading.current_thread())
                self._changed.notify_all()

    def join(self) -> None:
        """Waits until all have ended; one of them does not wait for those that do so too."""
        this = threading.current_thread()
        with self._changed:
            waited, not_waited = set(self._running), set[threading.Thread]()
            if this in self._running:
                self._joining.add(this)
                self._changed.notify_all()
                not_waited = self._joining
            self._changed.wait_for(lambda: self._running <= not_waited)
            ended = waited - self._running
        for thread in ended:
            thread.join()


def _named(letter: DeadLetter) -> tuple[int, str | None]:
    """Returns what names a dead letter: each consumer may have one of the same event."""
    if not isinstance(letter, DeadLetter):
        raise TypeError(
            f"letter was {letter!r}; it must be a DeadLetter: one of dead_letters(), or what "
            "on_dead_letter was given"
        )
    return letter.event_id, letter.consumer


def _letter(core: _core._RiskSystem, row: _core._LetterRow) -> DeadLetter:
    attempts = tuple(FailedAttempt(*attempt) for attempt in row[4])
    return DeadLetter(*row[:4], attempts, _decoded(core.event(row[0])))


def _decoded(event: _core._StoredEvent) -> Any:
    if isinstance(event, tuple):
        _, _, schema, version, content = event
        return decoder(schema, version)(content)
    return event


def _is_async(handler: Handler) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
        getattr(handler, "__call__", None)  # noqa: B004 - a class with `async def __call__`
    )


def _reason(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__qualname__}: {text}" if text else type(error).__qualname__


def _handle(consumer: RiskConsumer, handler: Handler) -> None:
    """Calls a handler with each event until the system is closed."""
    while True:
        try:
            delivery = consumer.take()
        except Closed:
            return
        except BusError as error:
            try:
                live = _wait_live(consumer, error)
            except Closed:
                return
            if live is None:
                continue
            delivery = live
        try:
            handler(delivery)
        except BaseException as error:  # A thread that exits would end its consumer unseen.
            _settle(delivery.nack, _reason(error))
        else:
            _settle(delivery.ack)


def _wait_live(consumer: RiskConsumer, error: BusError) -> CriticalDelivery | None:
    """Waits a moment for an event that the log has refused, while attempts cannot be counted."""
    _log.error("the consumer %r gets only live events for now: %s", consumer.name, error)
    row = consumer._core.wait_live()
    return None if row is None else CriticalDelivery(consumer._core, row)


def _settle(settle: Callable[..., None], *arguments: str) -> None:
    """Says how an attempt went; what cannot be said is delivered again."""
    try:
        settle(*arguments)
    except BusError as error:
        _log.warning("an event is delivered again: %s", error)


async def _handle_async(consumer: RiskConsumer, handler: _AsyncHandler) -> None:
    """As `_handle`, in a task."""
    while True:
        try:
            delivery = await consumer.take_async()
        except Closed:
            return
        except BusError as error:
            try:
                live = await asyncio.to_thread(_wait_live, consumer, error)
            except Closed:
                return
            if live is None:
                continue
            delivery = live
        try:
            await handler(delivery)
        except Exception as error:
            await _settle_async(delivery.nack_async(_reason(error)))
        else:
            await _settle_async(delivery.ack_async())


async def _settle_async(settling: Awaitable[None]) -> None:
    try:
        await settling
    except BusError as error:
        _log.warning("an event is delivered again: %s", error)


def _tell(
    core: _core._RiskSystem,
    escalate: Callable[[Escalation], object] | None,
    on_dead_letter: Callable[[DeadLetter], object] | None,
    on_limit: Callable[[TooManyInFlight], object] | None,
) -> None:
    """Calls those that want to be told until the system is closed."""
    while True:
        try:
            what, *values = core.next_notice()
        except Closed:
            return
        try:
            if what == "escalated" and escalate:
                escalate(Escalation(*values))
            elif what == "limit" and on_limit:
                on_limit(TooManyInFlight(*values))
            elif what == "dead" and on_dead_letter:
                # It may have been settled meanwhile.
                letters = [row for row in core.dead_letters() if list(row[:2]) == values[:2]]
                for row in letters:
                    on_dead_letter(_letter(core, row))
        except BaseException:  # As with handlers.
            _log.exception("what was to be told of a risk event has raised")
