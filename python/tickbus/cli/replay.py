"""The replay itself: a thread publishes, asyncio subscribers of one event loop sum.

```
events in memory ─► producer thread ─► bus ─► N subscriptions ─► N tasks of one loop: totals
                    stamps, publishes         policy `block`      receive time, latency
```
An event travels in a pair with the moment at which its `publish` was called, so the latency
contains the waiting of the publisher for room. The events are parsed before the first one is
published: the rate is that of the bus and of the summing, not that of a parser.
"""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import localcontext
from typing import Literal, TypeAlias, TypeVar

from tickbus import AsyncEventSubscription, BackpressureConfig, Closed, EventBus, Lagged
from tickbus.captures import MarketEvent, Trade, topic_name
from tickbus.cli.totals import EXACT, Instruments, Totals
from tickbus.pacing import LONGEST_GAP, Pacer

__all__ = ["ReplayOutcome", "ReplayPlan", "receive", "replay", "tick"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """How events are replayed.

    Attributes:
        backend: Name of a backend; `None` takes the default one.
        subscribers: Number of subscribers, at least 1.
        capacity: Events that a subscription holds, at least 1. `broadcast`, which can only
            overwrite, is given room for all events instead.
        speed: Recorded time per real time: 1 as recorded, 10 ten times faster, 0 flat out.
        longest_gap: Seconds of recorded time; gaps longer than this are not waited for.
    """

    backend: str | None = None
    subscribers: int = 4
    capacity: int = 10_000
    speed: float = 0.0
    longest_gap: float = LONGEST_GAP


@dataclass(frozen=True, slots=True)
class ReplayOutcome:
    """What happened in a replay.

    Attributes:
        backend: The backend that carried the events.
        published: Events published.
        shortfalls: Events of which `publish` said that not every subscriber took it.
        elapsed_seconds: From the first publish to the last subscriber's last sum.
        skipped_gaps: Gaps that were not waited for.
        delivered: Events received, by subscriber.
        lost: Events that were published but not received, summed over subscribers.
        totals: What each subscriber summed.
        latencies_ns: Publish-to-receive times in ns, by subscriber, in the order of receiving.
    """

    backend: str
    published: int
    shortfalls: int
    elapsed_seconds: float
    skipped_gaps: int
    delivered: tuple[int, ...]
    lost: int
    totals: tuple[Instruments, ...]
    latencies_ns: tuple[array[int], ...]

    @property
    def events_per_second(self) -> float:
        """Events per second that every subscriber received and summed."""
        return self.published / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0


async def replay(
    events: Sequence[MarketEvent],
    plan: ReplayPlan,
    on_progress: Callable[[int], None] | None = None,
) -> ReplayOutcome:
    """Carries events from a producer thread to asyncio subscribers of this event loop.

    Cancelling it closes the bus and ends the thread.

    Args:
        events: What to publish, in this order.
        plan: How.
        on_progress: Called about ten times a second with the number of events that the slowest
            subscriber has received.

    Raises:
        ConfigError: The backend is unknown or the capacity is out of range.
    """
    with _open_bus(plan, len(events)) as bus:
        policy: Literal["block"] | None = None if bus.backend == "broadcast" else "block"
        subscribers = [
            _Subscriber(bus.subscribe_async(policy=policy)) for _ in range(plan.subscribers)
        ]

        def slowest() -> int:
            return min(len(subscriber.latencies_ns) for subscriber in subscribers)

        producer = _Producer(bus, events, plan)
        ticker = asyncio.create_task(tick(slowest, on_progress))
        try:
            producer.start()
            async with asyncio.TaskGroup() as group:
                for subscriber in subscribers:
                    group.create_task(receive(subscriber.subscription, subscriber.add))
        finally:
            ticker.cancel()
            producer.stop()
            producer.join()
    if producer.error is not None:
        raise producer.error
    last_ns = max(subscriber.last_ns for subscriber in subscribers)
    delivered = tuple(len(subscriber.latencies_ns) for subscriber in subscribers)
    return ReplayOutcome(
        bus.backend,
        producer.published,
        producer.shortfalls,
        max(last_ns - producer.first_ns, 0) / 1e9 if producer.published else 0.0,
        producer.skipped_gaps,
        delivered,
        sum(producer.published - count for count in delivered),
        tuple(dict(subscriber.totals) for subscriber in subscribers),
        tuple(subscriber.latencies_ns for subscriber in subscribers),
    )


async def receive(
    subscription: AsyncEventSubscription[T], add: Callable[[list[T]], object]
) -> None:
    """Sums what a subscription receives until the bus is closed and everything was received.

    Args:
        subscription: What is read.
        add: Called with the events that have come together; it computes exactly.
    """
    with localcontext(EXACT):
        while True:
            try:
                add(await subscription.recv_many(_BATCH))
            except Lagged:
                continue  # The hole shows in the counts: published minus received.
            except Closed:
                return
            # A full queue never suspends `recv_many` for long; this lets the others in.
            await asyncio.sleep(0)


async def tick(count: Callable[[], int], on_progress: Callable[[int], None] | None) -> None:
    """Tells how many there are by now about ten times a second, until it is cancelled."""
    while on_progress is not None:
        on_progress(count())
        await asyncio.sleep(_TICK_SECONDS)


_BATCH = 256
_TICK_SECONDS = 0.1

_Stamped: TypeAlias = tuple[int, MarketEvent]


_PATIENCE_SECONDS = 86_400.0


def _open_bus(plan: ReplayPlan, events: int) -> EventBus[_Stamped]:
    """Opens a bus on which nothing can be lost."""
    backpressure = BackpressureConfig(max_block_duration=_PATIENCE_SECONDS)
    bus = EventBus[_Stamped](plan.backend, plan.capacity, backpressure)
    if bus.backend != "broadcast" or bus.capacity >= events:
        return bus
    bus.close()
    return EventBus[_Stamped](plan.backend, events, backpressure)


class _Producer(threading.Thread):
    """Publishes all events, then closes the bus."""

    def __init__(
        self, bus: EventBus[_Stamped], events: Sequence[MarketEvent], plan: ReplayPlan
    ) -> None:
        super().__init__(name="tickbus-replay-producer", daemon=True)
        self.published = 0
        self.first_ns = 0
        self.shortfalls = 0
        self.error: BaseException | None = None
        self._bus = bus
        self._events = events
        self._plan = plan
        self._pacer: Pacer | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        try:
            self._publish_all()
        except BaseException as why:
            if not (isinstance(why, Closed) and self._stopped.is_set()):
                self.error = why
        finally:
            self._bus.close()

    @property
    def skipped_gaps(self) -> int:
        """Gaps that were not waited for."""
        return 0 if self._pacer is None else self._pacer.skipped_gaps

    def stop(self) -> None:
        """Ends the thread soon, also where it waits for room or for the next event's time."""
        self._stopped.set()
        self._bus.close()

    def _publish_all(self) -> None:
        publish, clock = self._bus.publish, time.perf_counter_ns
        names = [topic_name(event) for event in self._events]
        topics = {name: self._bus.topic(name) for name in sorted(set(names))}
        wanted = self._plan.subscribers
        plan, pacer = self._plan, None
        if plan.speed > 0:
            pacer = self._pacer = Pacer(plan.speed, plan.longest_gap, self._stopped.wait)
        self.first_ns = clock()
        for event, name in zip(self._events, names, strict=True):
            if pacer is not None:
                pacer.wait_for(event.ts_recv)
                if self._stopped.is_set():
                    return
            taken = publish((clock(), event), topics[name])
            self.published += 1
            if taken != wanted:
                self.shortfalls += 1


@dataclass(slots=True)
class _Subscriber:
    """One asyncio task that receives everything and sums it."""

    subscription: AsyncEventSubscription[_Stamped]
    totals: Instruments = field(default_factory=lambda: defaultdict(Totals))
    latencies_ns: array[int] = field(default_factory=lambda: array("q"))
    last_ns: int = 0

    def add(self, batch: list[_Stamped]) -> None:
        """Sums events that were received now."""
        received = time.perf_counter_ns()
        totals, add_latency = self.totals, self.latencies_ns.append
        for stamp, event in batch:
            add_latency(received - stamp)
            total = totals[event.venue, event.symbol]
            if isinstance(event, Trade):
                total.trades += 1
                total.volume += event.size
                total.notional += event.price * event.size
            else:
                total.quotes += 1
                total.bid_sum += event.bid
                total.ask_sum += event.ask
        self.last_ns = time.perf_counter_ns()
