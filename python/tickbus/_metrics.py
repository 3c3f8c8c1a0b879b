"""What a bus counts, as frozen snapshots of one moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tickbus._core import _Row

__all__ = [
    "DROP_REASONS",
    "EventBusMetrics",
    "EventSystemMetrics",
    "Explanation",
    "LatencyHistogram",
    "SubscriptionMetrics",
]

DROP_REASONS = ("overwritten", "refused", "block_expired", "conflated", "closed")
"""Why a subscription did not receive an event that it was offered, in the core's order."""

_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionMetrics:
    """What one subscription was offered, what became of it, and how publishers stand to it.

    Whenever nothing moves, `offered == delivered + sum(dropped.values()) + pending`.

    Attributes:
        id: The subscription's id, unique within its bus.
        name: The name that it was given, or `None`.
        pattern: The pattern over topics, or `None` for everything.
        policy: `block`, `reject`, `drop_newest`, `drop_oldest` or `conflate`.
        capacity: Most events that it can hold; a snapshot takes no room.
        pending: Events that wait to be received.
        peak_pending: Most events that ever waited. On the `broadcast` backend it is what
            readings and metrics saw.
        offered: Wanted events published between join and leave, and those of its snapshot.
        delivered: Events that were received.
        dropped: Events that were not received, by reason: `overwritten`, `refused`,
            `block_expired`, `conflated`, `closed`.
        exact: Whether every dropped event was a wanted one.
        oldest_age: Seconds since the oldest pending event, or the hole before it, was published;
            `None` if nothing is pending. It is an upper bound, too long by at most the time
            between two readings of metrics (before the first: since the subscription joined),
            unless they were so frequent that not all of them are remembered.
        waiting_publishers: Publishers in line for its room.
        full_for: Seconds since a publisher that has to respect it found no room, or `None` if
            there was some since.
        is_passed_over: Whether the patience of publishers with this `block` subscription has
            ended: until it reads, they do not wait for it, and it misses what it has no room for.
        is_gating: Whether it stops publishers now: those of events that it wants wait for its
            room, or get `Full`.
    """

    id: int
    name: str | None
    pattern: str | None
    policy: str
    capacity: int
    pending: int
    peak_pending: int
    offered: int
    delivered: int
    dropped: Mapping[str, int] = field(hash=False)
    exact: bool
    oldest_age: float | None
    waiting_publishers: int
    full_for: float | None
    is_passed_over: bool
    is_gating: bool

    @property
    def room(self) -> int:
        """Events for which there is room."""
        return max(self.capacity - self.pending, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped", MappingProxyType(dict(self.dropped)))

    # A view of a mapping cannot be pickled, and slots have no dictionary to pickle instead.
    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {
            "dropped": dict(self.dropped)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """How long a random sample of the publications took, in seconds.

    Each is measured from the call to its return, waiting for room included; publications that
    failed are left out. The samples are counted, not the publications: those are
    `EventBusMetrics.total_published`.

    Attributes:
        buckets: Pairs of the longest latency that belongs to a bucket and the number of its
            samples, from short to long. A bucket is at most an eighth wide; those without samples
            are left out.
        sum: The sum of the latencies of all samples.
    """

    buckets: tuple[tuple[float, int], ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(count for _, count in self.buckets)

    def quantile(self, q: float) -> float | None:
        """Returns a latency that the fraction `q` of the samples did not exceed.

        Args:
            q: Between 0.0 and 1.0; 0.99 asks for the 99th percentile.

        Returns:
            Seconds, at most an eighth too long, or `None` without samples.

        Raises:
            ValueError: `q` lies outside its range.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q was {q!r}; it must be between 0.0 and 1.0")
        rank = max(math.ceil(q * self.count), 1)
        passed = 0
        for upper, count in self.buckets:
            passed += count
            if passed >= rank:
                return upper
        return None


@dataclass(frozen=True, slots=True)
class EventBusMetrics:
    """What a bus has carried, at one moment.

    Attributes:
        total_published: Events that were published, whatever the number of subscriptions.
        total_dropped: Events that subscriptions lost, over all reasons and over all
            subscriptions, also those that have left.
        subscriber_count: Subscriptions that are open.
        avg_queue_depth: Mean of the pending events over the open subscriptions, 0.0 without any.
        publish_latency: How long publishing took.
        subscriptions: A row for each open subscription, in the order in which they joined.
    """

    total_published: int
    total_dropped: int
    subscriber_count: int
    avg_queue_depth: float
    publish_latency: LatencyHistogram
    subscriptions: tuple[SubscriptionMetrics, ...]


@dataclass(frozen=True, slots=True)
class EventSystemMetrics:
    """What an event system has carried in each lane, at one moment.

    A subscription has a row with the same id in each lane.

    Attributes:
        critical: What the critical lane has carried.
        high: What the high lane has carried.
        normal: What the normal lane has carried.
    """

    critical: EventBusMetrics
    high: EventBusMetrics
    normal: EventBusMetrics


@dataclass(frozen=True, slots=True)
class Explanation:
    """Who stops the publishers of a bus, how far each subscription is behind, and since when.

    As text it has a line about the bus and one about each subscription.

    Attributes:
        bus: The id of the bus.
        closed: Whether the bus is closed.
        gating: Ids of the subscriptions that stop a publisher now, in the order in which they
            joined.
        subscriptions: A row for each open subscription, in the order in which they joined.
    """

    bus: int
    closed: bool
    gating: tuple[int, ...]
    subscriptions: tuple[SubscriptionMetrics, ...]
    _text: str = field(repr=False)

    def __str__(self) -> str:
        return self._text


def snapshot(
    published: int,
    dropped: int,
    depth: float,
    buckets: list[tuple[int, int]],
    nanoseconds: int,
    rows: list[_Row],
) -> EventBusMetrics:
    """Returns the core's plain counters as one frozen snapshot."""
    latency = LatencyHistogram(
        buckets=tuple((upper / _NANOSECONDS, count) for upper, count in buckets),
        sum=nanoseconds / _NANOSECONDS,
    )
    return EventBusMetrics(
        total_published=published,
        total_dropped=dropped,
        subscriber_count=len(rows),
        avg_queue_depth=depth,
        publish_latency=latency,
        subscriptions=tuple(map(_subscription_metrics, rows)),
    )


def explanation(
    bus: int, closed: bool, gating: list[int], rows: list[_Row], text: str
) -> Explanation:
    """Returns what the core says about a bus as one frozen snapshot."""
    return Explanation(bus, closed, tuple(gating), tuple(map(_subscription_metrics, rows)), text)


def _subscription_metrics(row: _Row) -> SubscriptionMetrics:
    shape, counts, drops, exact, standing = row
    identifier, name, pattern, policy, capacity = shape
    pending, peak_pending, offered, delivered = counts
    oldest_age, waiting_publishers, full_for, is_passed_over, is_gating = standing
    return SubscriptionMetrics(
        id=identifier,
        name=name,
        pattern=pattern,
        policy=policy,
        capacity=capacity,
        pending=pending,
        peak_pending=peak_pending,
        offered=offered,
        delivered=delivered,
        dropped=dict(zip(DROP_REASONS, drops, strict=True)),
        exact=exact,
        oldest_age=oldest_age,
        waiting_publishers=waiting_publishers,
        full_for=full_for,
        is_passed_over=is_passed_over,
        is_gating=is_gating,
    )
