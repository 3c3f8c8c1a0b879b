"""What a bus counts, as frozen snapshots of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

__all__ = ["DROP_REASONS", "EventBusMetrics", "SubscriptionMetrics"]

DROP_REASONS = ("overwritten", "refused", "block_expired", "conflated", "closed")
"""Why a subscription did not receive an event that it was offered, in the core's order."""

_Row: TypeAlias = tuple[
    int, str | None, str, int, int, int, int, tuple[int, int, int, int, int], bool
]


@dataclass(frozen=True, slots=True)
class SubscriptionMetrics:
    """What one subscription was offered and what became of it.

    Whenever nothing moves, `offered == delivered + sum(dropped.values()) + pending`.

    Attributes:
        id: The subscription's id, unique within its bus.
        pattern: The pattern over topics, or `None` for everything.
        policy: `block`, `reject`, `drop_newest`, `drop_oldest` or `conflate`.
        capacity: Most events that it can hold; a snapshot takes no room.
        pending: Events that wait to be received.
        offered: Wanted events published between join and leave, and those of its snapshot.
        delivered: Events that were received.
        dropped: Events that were not received, by reason: `overwritten`, `refused`,
            `block_expired`, `conflated`, `closed`.
        exact: Whether every dropped event was a wanted one.
    """

    id: int
    pattern: str | None
    policy: str
    capacity: int
    pending: int
    offered: int
    delivered: int
    dropped: Mapping[str, int] = field(hash=False)
    exact: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped", MappingProxyType(dict(self.dropped)))

    def __reduce__(self) -> tuple[Any, ...]:
        counts = self.pending, self.offered, self.delivered
        shape = self.id, self.pattern, self.policy, self.capacity
        return type(self), (*shape, *counts, dict(self.dropped), self.exact)


@dataclass(frozen=True, slots=True)
class EventBusMetrics:
    """What a bus has carried, at one moment.

    Attributes:
        total_published: Events that were published, whatever the number of subscriptions.
        total_dropped: Events that subscriptions lost, over all reasons and over all
            subscriptions, also those that have left.
        subscriber_count: Subscriptions that are open.
        avg_queue_depth: Mean of the pending events over the open subscriptions, 0.0 without any.
        subscriptions: A row for each open subscription.
    """

    total_published: int
    total_dropped: int
    subscriber_count: int
    avg_queue_depth: float
    subscriptions: tuple[SubscriptionMetrics, ...]


def snapshot(published: int, dropped: int, rows: list[_Row]) -> EventBusMetrics:
    """Returns the core's plain counters as one frozen snapshot."""
    subscriptions = tuple(_subscription_metrics(row) for row in rows)
    pending = sum(subscription.pending for subscription in subscriptions)
    return EventBusMetrics(
        total_published=published,
        total_dropped=dropped,
        subscriber_count=len(subscriptions),
        avg_queue_depth=pending / len(subscriptions) if subscriptions else 0.0,
        subscriptions=subscriptions,
    )


def _subscription_metrics(row: _Row) -> SubscriptionMetrics:
    identifier, pattern, policy, capacity, pending, offered, delivered, drops, exact = row
    return SubscriptionMetrics(
        id=identifier,
        pattern=pattern,
        policy=policy,
        capacity=capacity,
        pending=pending,
        offered=offered,
        delivered=delivered,
        dropped=dict(zip(DROP_REASONS, drops, strict=True)),
        exact=exact,
    )
