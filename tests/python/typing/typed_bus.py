"""The types of a typed bus that a user's type checker sees; checked by mypy, never run."""

from typing import assert_type

import msgspec

from tickbus import AsyncEventSubscription, Envelope, EventBus, EventSubscription, events
from tickbus.events import AnyEvent, MarketData
from tickbus.recorder import EventRecorder
from tickbus.typed import TypedEventBus, TypeStats


class Tick(msgspec.Struct, frozen=True):
    """A type of the user."""

    timestamp: int
    symbol: str


def subscribing(bus: TypedEventBus) -> None:
    data = bus.subscribe(MarketData, "BTCUSDT", capacity=64, policy="drop_oldest", on_lag="count")
    assert_type(data, EventSubscription[MarketData])
    assert_type(data.recv(), MarketData)
    enveloped = bus.subscribe(MarketData, envelope=True)
    assert_type(enveloped, EventSubscription[Envelope[MarketData]])
    assert_type(enveloped.recv().event, MarketData)
    assert_type(enveloped.recv().topic, str | None)
    assert_type(bus.subscribe_market_data(envelope=True).recv().sequence, int)
    assert_type(bus.subscribe_market_data("BTCUSDT", key=lambda data: data.symbol).id, int)
    bus.subscribe(MarketData, key=lambda data: data.strategy)  # type: ignore[attr-defined]
    bus.subscribe(str)  # type: ignore[type-var]
    bus.subscribe_market_data(policy="sometimes")  # type: ignore[call-overload]
    bus.subscribe_nothing()  # type: ignore[attr-defined]


async def awaiting(bus: TypedEventBus, event: AnyEvent) -> None:
    data = bus.subscribe_async(MarketData)
    assert_type(data, AsyncEventSubscription[MarketData])
    assert_type(await data.recv(), MarketData)
    enveloped = bus.subscribe_market_data_async(envelope=True)
    assert_type(await enveloped.recv(), Envelope[MarketData])
    assert_type(await bus.publish_async(event), int)


def owning(bus: TypedEventBus, other: EventBus[str]) -> None:
    bus.register(Tick)
    assert_type(bus.publish(Tick(0, "BTCUSDT")), int)
    assert_type(bus.subscribe(Tick), EventSubscription[Tick])
    assert_type(bus.get_stats()[Tick], TypeStats)
    assert_type(bus.with_recording(8), TypedEventBus)
    assert_type(bus.recorder(), EventRecorder)
    assert_type(bus.recorder().replay(other, speed=1.0), int)
    assert_type(bus.recorder().replay(bus), int)
    with TypedEventBus(other) as opened:
        assert_type(opened, TypedEventBus)
    bus.publish("no struct")  # type: ignore[arg-type]


def each_type(bus: TypedEventBus) -> None:
    assert_type(bus.subscribe_market_data(), EventSubscription[events.MarketData])
    assert_type(bus.subscribe_aggregated_data(), EventSubscription[events.AggregatedData])
    assert_type(bus.subscribe_order_book(), EventSubscription[events.OrderBook])
    assert_type(bus.subscribe_feature(), EventSubscription[events.Feature])
    assert_type(bus.subscribe_signal(), EventSubscription[events.Signal])
    assert_type(bus.subscribe_prediction(), EventSubscription[events.Prediction])
    assert_type(bus.subscribe_approved_signal(), EventSubscription[events.ApprovedSignal])
    assert_type(bus.subscribe_rejected_signal(), EventSubscription[events.RejectedSignal])
    assert_type(bus.subscribe_order(), EventSubscription[events.Order])
    assert_type(bus.subscribe_fill(), EventSubscription[events.Fill])
    assert_type(bus.subscribe_order_update(), EventSubscription[events.OrderUpdate])
    assert_type(bus.subscribe_metrics(), EventSubscription[events.Metrics])
    assert_type(bus.subscribe_performance(), EventSubscription[events.Performance])
    assert_type(bus.subscribe_config(), EventSubscription[events.Config])
    assert_type(bus.subscribe_health(), EventSubscription[events.Health])
    assert_type(bus.subscribe_error(), EventSubscription[events.Error])
    assert_type(bus.subscribe_market_data_async(), AsyncEventSubscription[events.MarketData])
    assert_type(
        bus.subscribe_aggregated_data_async(), AsyncEventSubscription[events.AggregatedData]
    )
    assert_type(bus.subscribe_order_book_async(), AsyncEventSubscription[events.OrderBook])
    assert_type(bus.subscribe_feature_async(), AsyncEventSubscription[events.Feature])
    assert_type(bus.subscribe_signal_async(), AsyncEventSubscription[events.Signal])
    assert_type(bus.subscribe_prediction_async(), AsyncEventSubscription[events.Prediction])
    assert_type(
        bus.subscribe_approved_signal_async(), AsyncEventSubscription[events.ApprovedSignal]
    )
    assert_type(
        bus.subscribe_rejected_signal_async(), AsyncEventSubscription[events.RejectedSignal]
    )
    assert_type(bus.subscribe_order_async(), AsyncEventSubscription[events.Order])
    assert_type(bus.subscribe_fill_async(), AsyncEventSubscription[events.Fill])
    assert_type(bus.subscribe_order_update_async(), AsyncEventSubscription[events.OrderUpdate])
    assert_type(bus.subscribe_metrics_async(), AsyncEventSubscription[events.Metrics])
    assert_type(bus.subscribe_performance_async(), AsyncEventSubscription[events.Performance])
    assert_type(bus.subscribe_config_async(), AsyncEventSubscription[events.Config])
    assert_type(bus.subscribe_health_async(), AsyncEventSubscription[events.Health])
    assert_type(bus.subscribe_error_async(), AsyncEventSubscription[events.Error])
