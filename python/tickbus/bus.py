"""The bus as Python code names it: one class that picks a backend, and one for each backend."""

from __future__ import annotations

import asyncio
import os
from types import GenericAlias
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from tickbus import _core, _metrics, _warnings
from tickbus.config import BackpressureConfig, check_seconds
from tickbus.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from tickbus.envelope import Clock

__all__ = ["BroadcastEventBus", "EventBus", "LockFreeEventBus", "RingEventBus"]

T = TypeVar("T")

_DEFAULT_BACKEND = "lock_free"
_DEFAULT_CAPACITY = 10_000
_DEFAULT_MAX_TOPICS = 65_536
_DEFAULT_LATENCY_SAMPLING = 128
_DRAIN_POLL_SECONDS = 0.005

if TYPE_CHECKING:
    from tickbus._core import EventBus as _Core
else:
    _Core = GenericAlias(_core.EventBus, (T,))


class EventBus(_Core[T], Generic[T]):
    """Carries every published event to every matching subscription, over a backend by name.

    Calling it gives a `LockFreeEventBus`, a `BroadcastEventBus` or a `RingEventBus`. A bus
    belongs to no event loop and to no thread: it is made anywhere and used from everywhere.

    Args:
        backend: `lock_free`, `broadcast` or `ring`; `None` takes the environment variable
            `TICKBUS_BACKEND`, and `lock_free` where that is not set or empty.
        capacity: Events that a subscription holds by default, at least 1, rounded up to 2^n.
        backpressure: What happens when a subscription has no room; `None` takes
            `BackpressureConfig()`.
        max_topics: Most topics that may ever be named, at least 1.
        keep_last: A pattern over topics, ">" for all; of each that matches, the last event is
            kept for `last()` and for `subscribe(snapshot=True)`. `None` keeps nothing.
        latency_sampling: Publications for each one whose latency is measured, in the mean, at
            least 1; they are drawn at random. `None` measures none.
        producers: How publishers get past each other: `shared`, or, on backend `ring` only,
            `strict`. It matters where the Rust crate publishes from threads of its own; here they
            take turns by the global interpreter lock either way.
        clock: What tells the time of publishing; `None` is the system's clock.

    Raises:
        ConfigError: The backend is unknown or not built in, a number is out of range,
            `keep_last` is no pattern, or `producers` is `strict` on another backend than `ring`.

    Example:
        >>> import tickbus
        >>> with tickbus.EventBus() as bus:
        ...     trades = bus.subscribe("trades.*")
        ...     bus.publish({"price": 61_000}, topic="trades.BTCUSDT")
        ...     trades.recv()
        1
        {'price': 61000}
    """

    __slots__ = ()

    def __new__(
        cls,
        backend: str | None = None,
        capacity: int = _DEFAULT_CAPACITY,
        backpressure: BackpressureConfig | None = None,
        *,
        max_topics: int = _DEFAULT_MAX_TOPICS,
        keep_last: str | None = None,
        latency_sampling: int | None = _DEFAULT_LATENCY_SAMPLING,
        producers: str = "shared",
        clock: Clock | None = None,
    ) -> Self:
        name = _backend_name(backend)
        chosen = cast("type[Self]", _SUBCLASSES[name]) if cls is EventBus else cls
        bus = super().__new__(
            chosen,
            capacity,
            backpressure,
            backend=name,
            max_topics=max_topics,
            keep_last=keep_last,
            latency_sampling=latency_sampling,
            producers=producers,
            clock=clock,
        )
        if backpressure is not None and backpressure.warn_threshold is not None:
            _warnings.start()
        return bus

    def metrics(self) -> _metrics.EventBusMetrics:
        """Returns the counters of this moment, with a row for each open subscription."""
        return _metrics.snapshot(*self._metrics())

    def explain(self) -> _metrics.Explanation:
        """Returns who stops publishers now, how far each subscription is behind, and since when.

        It costs what `metrics()` costs and stops nobody. Print it.
        """
        return _metrics.explanation(*self._explain())

    async def aclose(self, drain: float | None = None) -> int:
        """Ends publishing and gives the readers time to read what is pending.

        Subscriptions stay open: their readers get everything that is pending and then `Closed`.
        Cancelling the wait leaves the bus closed.

        Args:
            drain: Seconds to wait until nothing is pending, finite and at least 0; `None` does
                not wait.

        Returns:
            Events that are still pending over all open subscriptions; 0 means drained.

        Raises:
            ConfigError: `drain` is negative or not finite; the bus is as it was.
        """
        check_seconds("drain", drain)
        self.close()
        return await drained(self._pending, drain)

    def _pending(self) -> int:
        return sum(row.pending for row in self.metrics().subscriptions)


class _NamedEventBus(EventBus[T]):
    """A bus of the one backend that its class names."""

    __slots__ = ()
    _backend: ClassVar[str]

    def __new__(
        cls,
        capacity: int = _DEFAULT_CAPACITY,
        backpressure: BackpressureConfig | None = None,
        *,
        max_topics: int = _DEFAULT_MAX_TOPICS,
        keep_last: str | None = None,
        latency_sampling: int | None = _DEFAULT_LATENCY_SAMPLING,
        producers: str = "shared",
        clock: Clock | None = None,
    ) -> Self:
        return super().__new__(
            cls,
            cls._backend,
            capacity,
            backpressure,
            max_topics=max_topics,
            keep_last=keep_last,
            latency_sampling=latency_sampling,
            producers=producers,
            clock=clock,
        )


class LockFreeEventBus(_NamedEventBus[T]):
    """A bus with one bounded queue for each subscription; it keeps all five policies.

    Args:
        capacity: Events that a subscription holds by default, at least 1, rounded up to 2^n.
        backpressure: What happens when a subscription has no room; `None` takes
            `BackpressureConfig()`, with which publishers wait for at most 1.0 s.
        max_topics: Most topics that may ever be named, at least 1.
        keep_last: A pattern over topics, ">" for all; of each that matches, the last event is
            kept for `last()` and for `subscribe(snapshot=True)`. `None` keeps nothing.
        latency_sampling: Publications for each one whose latency is measured, in the mean, at
            least 1; they are drawn at random. `None` measures none.
        producers: `shared`; only `RingEventBus` has another way.
        clock: What tells the time of publishing; `None` is the system's clock.

    Raises:
        ConfigError: A number is out of range, `keep_last` is no pattern, or `producers` is not to
            be had.
    """

    __slots__ = ()
    _backend = "lock_free"


class BroadcastEventBus(_NamedEventBus[T]):
    """A bus with one channel for all subscriptions; a slow one loses its oldest events.

    Its policies are `drop_oldest` and `conflate`.

    Args:
        capacity: Events that the channel holds, at least 1, rounded up to 2^n.
        backpressure: `warn_threshold` applies; publishers never wait here.
        max_topics: Most topics that may ever be named, at least 1.
        keep_last: A pattern over topics, ">" for all; of each that matches, the last event is
            kept for `last()` and for `subscribe(snapshot=True)`. `None` keeps nothing.
        latency_sampling: Publications for each one whose latency is measured, in the mean, at
            least 1; they are drawn at random. `None` measures none.
        producers: `shared`; only `RingEventBus` has another way.
        clock: What tells the time of publishing; `None` is the system's clock.

    Raises:
        ConfigError: A number is out of range, `keep_last` is no pattern, `producers` is not to be
            had, or the backend is not built in.
    """

    __slots__ = ()
    _backend = "broadcast"


class RingEventBus(_NamedEventBus[T]):
    """A bus with one sequence of slots for all subscriptions, and a cursor for each.

    Publishing costs the same for any number of subscriptions, all of which see the same order.
    The policies are `block`, `reject`, `drop_oldest` and `conflate`. The ring has the room: a
    subscription that is a whole ring behind makes publishers wait, refuses the event or loses up to
    a quarter of the ring, whether it wants the next event or not. An event stays alive until the
    ring has come round.

    Args:
        capacity: Events that the ring holds, at least 1, rounded up to 2^n.
        backpressure: What happens when a subscription is a whole ring behind; `None` takes
            `BackpressureConfig()`, with which publishers wait for at most 1.0 s.
        max_topics: Most topics that may ever be named, at least 1.
        keep_last: A pattern over topics, ">" for all; of each that matches, the last event is
            kept for `last()` and for `subscribe(snapshot=True)`. `None` keeps nothing.
        latency_sampling: Publications for each one whose latency is measured, in the mean, at
            least 1; they are drawn at random. `None` measures none.
        producers: How publishers get past each other: `shared` or `strict`. It matters where the
            Rust crate publishes from threads of its own; here they take turns by the global
            interpreter lock either way.
        clock: What tells the time of publishing; `None` is the system's clock.

    Raises:
        ConfigError: A number is out of range, `keep_last` is no pattern, or `producers` is not to
            be had.
    """

    __slots__ = ()
    _backend = "ring"


async def drained(pending: Callable[[], int], seconds: float | None) -> int:
    """Waits until nothing is pending, for so many seconds at most, and returns what still is."""
    deadline = asyncio.get_running_loop().time() + (seconds or 0.0)
    while (waiting := pending()) > 0:
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            break
        await asyncio.sleep(min(left, _DRAIN_POLL_SECONDS))
    return waiting


_SUBCLASSES: dict[str, type[EventBus[Any]]] = {
    "lock_free": LockFreeEventBus,
    "broadcast": BroadcastEventBus,
    "ring": RingEventBus,
}


def _backend_name(backend: str | None) -> str:
    source, name = "backend", backend
    if backend is None:
        source = "the environment variable TICKBUS_BACKEND"
        name = os.environ.get("TICKBUS_BACKEND") or _DEFAULT_BACKEND
    built_in = _core._backends()
    if name not in built_in:
        choices = ", ".join(repr(choice) for choice in built_in)
        raise ConfigError(f"{source} was {name!r}; it must be one of {choices}")
    return name
