"""The event system as Python code names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tickbus import _core, _metrics
from tickbus.bus import drained
from tickbus.config import check_seconds

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["EventSystem"]


class EventSystem(_core.EventSystem):
    """Carries compact events in three lanes: critical, high and normal.

    The type and the priority of an event say its lane. A reader takes what is critical first, then
    what is high, then the rest; inside a lane events come in the order of publication. A critical
    event goes at once to every subscription with room; for the others the publisher waits, and is
    told by `CriticalOverflow` who misses it. In the other lanes it never waits: a subscription that
    is a whole ring behind loses its oldest events of that lane. Every loss is told by `Lagged`.

    Events are bytes: Rust threads, and threads that wait, need no global interpreter lock.

    Args:
        critical_capacity: Critical events that a subscription holds, at least 1, rounded up to 2^n.
        high_capacity: High events that the ring for all holds, at least 1, rounded up to 2^n.
        normal_capacity: Normal events that the ring for all holds, at least 1, rounded up to 2^n.
        max_block_duration: Seconds for which one call of `publish` waits for room for critical
            events, finite and at least 0.
        max_topics: Most pairs of type and symbol that the system will know, at least 1.
        latency_sampling: Publications for each one whose latency is measured, in the mean, at
            least 1; they are drawn at random. `None` measures none.

    Raises:
        ConfigError: A number is out of range.

    Example:
        >>> from tickbus import Event, EventSystem, EventType
        >>> with EventSystem() as system, system.subscribe(symbols="BTCUSDT") as btc:
        ...     system.publish(Event(0, EventType.PriceUpdate, symbol="BTCUSDT", value=61_000.0))
        ...     system.publish(Event(0, EventType.CircuitBreaker, symbol="BTCUSDT"))
        ...     [event.event_type.name for event in btc.recv_many(10)]
        1
        1
        ['circuit_breaker', 'price_update']
    """

    __slots__ = ()

    def __new__(
        cls,
        critical_capacity: int = 1_024,
        high_capacity: int = 8_192,
        normal_capacity: int = 65_536,
        *,
        max_block_duration: float = 1.0,
        max_topics: int = 65_536,
        latency_sampling: int | None = 128,
    ) -> Self:
        return super().__new__(
            cls,
            critical_capacity,
            high_capacity,
            normal_capacity,
            max_block_duration=max_block_duration,
            max_topics=max_topics,
            latency_sampling=latency_sampling,
        )

    def metrics(self) -> _metrics.EventSystemMetrics:
        """Returns what the system has counted in each lane; it stops nobody."""
        return _metrics.EventSystemMetrics(*(_metrics.snapshot(*row) for row in self._metrics()))

    async def aclose(self, drain: float | None = None) -> int:
        """Ends publishing and gives the readers time to read what is pending.

        Subscriptions stay open: their readers get everything that is pending and then `Closed`.
        Cancelling the wait leaves the system closed.

        Args:
            drain: Seconds to wait until nothing is pending, finite and at least 0; `None` does
                not wait.

        Returns:
            Events that are still pending over all open subscriptions; 0 means drained.

        Raises:
            ConfigError: `drain` is negative or not finite; the system is as it was.
        """
        check_seconds("drain", drain)
        self.close()
        return await drained(lambda: self.pending, drain)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc_value, traceback)
