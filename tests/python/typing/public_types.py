"""The types that a user's type checker sees; checked by mypy, never run."""

import asyncio
import time
from collections.abc import Mapping
from typing import Literal, assert_type

from prometheus_client import CollectorRegistry

import tickbus
from tickbus import (
    AsyncEventSubscription,
    AsyncSystemSubscription,
    BackpressureConfig,
    Clock,
    Envelope,
    Event,
    EventBatch,
    EventBus,
    EventBusMetrics,
    EventSubscription,
    EventSystem,
    EventSystemMetrics,
    EventType,
    Explanation,
    LatencyHistogram,
    LockFreeEventBus,
    LockFreeEventQueue,
    Priority,
    Shutdown,
    SubscriptionMetrics,
    SystemSubscription,
    Topic,
)
from tickbus.anyio import EventReceiveStream
from tickbus.metrics import BusCollector


class Trade:
    """An event of the user."""


def publishing(bus: EventBus[Trade]) -> None:
    topic = bus.topic("trades.BTCUSDT")
    assert_type(topic, Topic)
    assert_type(topic.name, str)
    assert_type(bus.publish(Trade()), int)
    assert_type(bus.publish(Trade(), "trades.BTCUSDT"), int)
    assert_type(bus.publish(Trade(), topic=topic), int)
    assert_type(bus.publish_timeout(Trade(), 0.5), int)
    assert_type(bus.publish_many([Trade(), Trade()], topic), int)
    bus.publish("no trade")  # type: ignore[arg-type]
    bus.publish_many(["no trade"])  # type: ignore[list-item]
    bus.publish_timeout(Trade())  # type: ignore[call-arg]


def receiving(bus: EventBus[Trade]) -> None:
    subscription = bus.subscribe("trades.*", 1_024, policy="drop_oldest", on_lag="count")
    assert_type(subscription, EventSubscription[Trade])
    assert_type(subscription.recv(), Trade)
    assert_type(subscription.try_recv(), Trade | None)
    assert_type(subscription.recv_timeout(1.0), Trade)
    assert_type(subscription.recv_many(64), list[Trade])
    assert_type(subscription.id, int)
    assert_type(subscription.pattern, str | None)
    assert_type(subscription.pending, int)
    for event in subscription:
        assert_type(event, Trade)
    with subscription as same:
        assert_type(same, EventSubscription[Trade])
    assert_type(
        tickbus.select([subscription], Shutdown(), timeout=1.0), EventSubscription[Trade] | None
    )
    newest = bus.subscribe(policy="conflate", key=lambda trade: id(trade), snapshot=True)
    assert_type(newest, EventSubscription[Trade])
    assert_type(bus.last("trades.BTCUSDT"), Trade | None)
    bus.subscribe(policy="conflate", key=list[Trade])  # type: ignore[call-overload]
    bus.subscribe(policy="sometimes")  # type: ignore[call-overload]
    bus.subscribe(on_lag="never")  # type: ignore[call-overload]


async def awaiting(bus: EventBus[Trade]) -> None:
    assert_type(await bus.publish_async(Trade()), int)
    subscription = bus.subscribe_async()
    assert_type(subscription, AsyncEventSubscription[Trade])
    assert_type(await subscription.recv(), Trade)
    assert_type(await subscription.recv_many(64), list[Trade])
    assert_type(subscription.try_recv(), Trade | None)
    assert_type(asyncio.create_task(subscription.recv()), asyncio.Task[Trade])
    assert_type(await asyncio.wait_for(subscription.recv(), 1.0), Trade)
    both = await asyncio.gather(subscription.recv(), subscription.recv_many(2))
    assert_type(both, tuple[Trade, list[Trade]])
    async with asyncio.TaskGroup() as group:
        assert_type(group.create_task(bus.publish_async(Trade())), asyncio.Task[int])
    async for event in subscription:
        assert_type(event, Trade)
    async with subscription as same:
        assert_type(same, AsyncEventSubscription[Trade])
    assert_type(await subscription.aclose(), None)
    assert_type(await bus.aclose(drain=1.0), int)
    async with bus as opened:
        assert_type(opened, EventBus[Trade])


def making() -> None:
    assert_type(LockFreeEventBus[Trade](1_024), LockFreeEventBus[Trade])
    assert_type(EventBus[Trade]("lock_free", 1_024, BackpressureConfig()), EventBus[Trade])
    with LockFreeEventBus[Trade](max_topics=16, keep_last="trades.>") as bus:
        assert_type(bus, LockFreeEventBus[Trade])
    wider: EventBus[Trade] = tickbus.BroadcastEventBus()
    publishing(wider)
    LockFreeEventBus[Trade]("lock_free")  # type: ignore[arg-type]
    BackpressureConfig().drop_oldest = True  # type: ignore[misc]


def measuring(bus: EventBus[Trade]) -> None:
    metrics = bus.metrics()
    assert_type(metrics, EventBusMetrics)
    assert_type(metrics.total_published, int)
    assert_type(metrics.avg_queue_depth, float)
    assert_type(metrics.subscriptions, tuple[SubscriptionMetrics, ...])
    assert_type(metrics.subscriptions[0].dropped, Mapping[str, int])
    assert_type(metrics.subscriptions[0].peak_pending, int)
    assert_type(metrics.subscriptions[0].oldest_age, float | None)
    latency = metrics.publish_latency
    assert_type(latency, LatencyHistogram)
    assert_type(latency.buckets, tuple[tuple[float, int], ...])
    assert_type(latency.count, int)
    assert_type(latency.quantile(0.99), float | None)
    explanation = bus.explain()
    assert_type(explanation, Explanation)
    assert_type(explanation.gating, tuple[int, ...])
    assert_type(explanation.subscriptions[0].full_for, float | None)
    assert_type(explanation.subscriptions[0].room, int)
    assert_type(str(explanation), str)
    assert_type(bus.subscribe(name="risk").name, str | None)
    EventBus[Trade](latency_sampling=None)
    collector = BusCollector(bus)
    assert_type(collector, BusCollector)
    collector.add(bus, name="market")
    CollectorRegistry().register(collector)


def compact(event: Event, batch: EventBatch) -> None:
    Event(1, "price_update", Priority.High, "binance", "BTCUSDT", 1.5, 0)
    Event(1, EventType.PriceUpdate, symbol=7, source_id=None)
    Event(1)  # type: ignore[call-arg]
    Event(1, 0, price=1.5)  # type: ignore[call-arg]
    event.value = 1.5  # type: ignore[misc]
    assert_type(event.event_type, EventType)
    assert_type(event.priority, Priority)
    assert_type(event.symbol, str | None)
    assert_type(event.symbol_id, int)
    assert_type(event.lane, Literal["critical", "high", "normal"])
    assert_type(event.replace(value=2.5), Event)
    assert_type(Event.from_bytes(event.to_bytes()), Event)
    assert_type(EventType.PriceUpdate, EventType)
    assert_type(EventType.register("alpha_decay", 40), EventType)
    assert_type(EventType.known(), tuple[EventType, ...])
    assert_type(EventType("price_update").is_market, bool)
    assert_type(Priority(1), Priority)
    assert_type(tickbus.symbols.intern("BTCUSDT"), int)
    assert_type(tickbus.sources.find("binance"), int | None)
    assert_type(batch[0], Event)
    assert_type(batch[1:], EventBatch)
    for each in batch:
        assert_type(each, Event)
    assert_type(EventBatch(batch.to_numpy()), EventBatch)
    EventBatch([1])  # type: ignore[list-item]
    batch[0] = event  # type: ignore[index]


def enveloping(bus: EventBus[Trade]) -> None:
    enveloped = bus.subscribe("trades.*", envelope=True)
    assert_type(enveloped, EventSubscription[Envelope[Trade]])
    assert_type(enveloped.recv().event, Trade)
    assert_type(enveloped.recv().sequence, int)
    assert_type(bus.subscribe_async(envelope=True), AsyncEventSubscription[Envelope[Trade]])
    assert_type(EventBus[Trade](clock=time).clock, Clock)
    EventBus[Trade](clock=time.time_ns)  # type: ignore[arg-type]


async def queueing(queue: LockFreeEventQueue[Trade]) -> None:
    assert_type(LockFreeEventQueue[Trade](capacity=64), LockFreeEventQueue[Trade])
    assert_type(await queue.dequeue_async(), Trade)
    assert_type(queue.dequeue(), Trade)
    assert_type(queue.dequeue_timeout(1.0), Trade)
    assert_type(queue.try_dequeue(), Trade | None)
    assert_type((queue.size, queue.capacity, queue.is_empty), tuple[int, int, bool])
    assert_type(asyncio.create_task(queue.enqueue_async(Trade())), asyncio.Task[None])
    queue.enqueue("no trade")  # type: ignore[arg-type]


def failing(full: tickbus.Full, lagged: tickbus.Lagged, bad: tickbus.ParseError) -> None:
    assert_type(full.subscriptions, tuple[int, ...])
    assert_type(full.accepted, int | None)
    assert_type(lagged.missed, int)
    assert_type(lagged.exact, bool)
    assert_type(bad.position, int | None)
    assert_type(tickbus.__version__, str)


def lanes(system: EventSystem, event: Event, batch: EventBatch) -> None:
    assert_type(system.publish(event), int)
    assert_type(system.publish_batch(batch), int)
    assert_type(system.metrics(), EventSystemMetrics)
    with system, system.subscribe("price_update", symbols=["BTCUSDT"]) as subscription:
        assert_type(subscription, SystemSubscription)
        assert_type(subscription.try_recv(), Event | None)
        assert_type(subscription.recv_batch(64), EventBatch)
        assert_type(list(subscription), list[Event])
        assert_type(tickbus.select([subscription]), SystemSubscription | None)
        trades = EventBus[Trade]().subscribe()
        mixed: list[SystemSubscription | EventSubscription[Trade]] = [subscription, trades]
        assert_type(tickbus.select(mixed), SystemSubscription | EventSubscription[Trade] | None)


async def awaited_lanes(system: EventSystem, event: Event) -> None:
    assert_type(await system.publish_async(event), int)
    async with system, system.subscribe_async([EventType.PriceUpdate]) as subscription:
        assert_type(subscription, AsyncSystemSubscription)
        assert_type(await subscription.recv(), Event)
        assert_type([event async for event in subscription], list[Event])
        assert_type(EventReceiveStream(subscription), EventReceiveStream[Event])
    stream = EventReceiveStream(EventBus[Trade]().subscribe_async())
    assert_type(stream, EventReceiveStream[Trade])
    assert_type(await stream.receive(), Trade)
    assert_type(await system.aclose(drain=1.0), int)
