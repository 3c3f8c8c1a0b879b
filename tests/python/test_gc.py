"""Memory: the garbage collector sees through buses, and no object outlives its last reader."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import tickbus
from support import RELEASING_BACKENDS, MakeBus, assert_sums_closed, read_all

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)
releasing = pytest.mark.parametrize("backend", RELEASING_BACKENDS, indirect=True)


class Payload:
    """An event that can be watched."""

    def __init__(self) -> None:
        self.links: list[object] = []


def _alive(watched: list[weakref.ref[Payload]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in watched)


@pytest.mark.parametrize("reader", ["subscribe", "subscribe_async"])
def test_a_cycle_from_a_pending_event_back_to_its_bus_is_collected(
    backend: str, reader: str
) -> None:
    bus: tickbus.EventBus[Any] = tickbus.EventBus(backend, 4)
    subscription = getattr(bus, reader)()
    payload = Payload()
    payload.links += [bus, subscription]
    bus.publish(payload)
    watched = weakref.ref(payload)
    watched_bus = weakref.ref(bus)
    bus.close()
    del bus, subscription, payload
    assert _alive([watched]) == 0
    assert watched_bus() is None


@releasing
def test_a_pending_event_lives_until_it_is_received(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe()
    watched = weakref.ref(_publish_new(bus))
    assert _alive([watched]) == 1
    assert isinstance(subscription.try_recv(), Payload)
    assert _alive([watched]) == 0


@releasing
def test_an_event_lives_until_its_last_reader_has_received_it(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    first, second = bus.subscribe(), bus.subscribe()
    watched = weakref.ref(_publish_new(bus))
    assert isinstance(first.try_recv(), Payload)
    assert _alive([watched]) == 1
    assert second.try_recv() is watched()
    assert _alive([watched]) == 0


@releasing
def test_an_event_that_nobody_wants_is_released_at_once(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    assert _alive([weakref.ref(_publish_new(bus))]) == 0
    with bus.subscribe("trades"):
        assert _alive([weakref.ref(_publish_new(bus))]) == 0


@releasing
def test_overwritten_events_are_released(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe(policy="drop_oldest")
    watched = [weakref.ref(_publish_new(bus)) for _ in range(100)]
    assert _alive(watched) == 4
    read_all(subscription)
    assert _alive(watched) == 0
    assert_sums_closed(bus)


@lock_free
@pytest.mark.parametrize("policy", ["reject", "drop_newest", "block"])
def test_events_without_room_are_released(make_bus: MakeBus, policy: str) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe(policy=policy)
    watched: list[weakref.ref[Payload]] = []
    for _ in range(20):
        payload = Payload()
        watched.append(weakref.ref(payload))
        try:
            bus.publish(payload)
        except tickbus.Full as full:
            assert policy == "reject"
            del full
        del payload
    assert _alive(watched) == 4
    read_all(subscription)
    assert _alive(watched) == 0
    assert_sums_closed(bus)


@releasing
def test_closing_a_subscription_releases_its_pending_events(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe()
    watched = [weakref.ref(_publish_new(bus)) for _ in range(4)]
    subscription.close()
    assert _alive(watched) == 0
    assert bus.metrics().total_dropped == 4


def test_dropping_the_bus_and_its_subscriptions_releases_everything(backend: str) -> None:
    bus: tickbus.EventBus[Any] = tickbus.EventBus(backend, 4)
    subscription = bus.subscribe()
    watched = [weakref.ref(_publish_new(bus)) for _ in range(4)]
    watched_bus = weakref.ref(bus)
    subscription.close()
    bus.close()
    del bus, subscription
    assert _alive(watched) == 0
    assert watched_bus() is None


def test_a_subscription_outlives_the_name_of_its_bus(backend: str) -> None:
    bus: tickbus.EventBus[Any] = tickbus.EventBus(backend, 4)
    with bus.subscribe() as subscription:
        bus.publish("event")
        bus.close()
        del bus
        gc.collect()
        assert list(subscription) == ["event"]


@releasing
def test_many_events_through_a_bus_leave_nothing_behind(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    first, second = bus.subscribe(), bus.subscribe()
    watched: list[weakref.ref[Payload]] = []
    for _ in range(100):
        watched += [weakref.ref(_publish_new(bus)) for _ in range(64)]
        assert len(read_all(first)) == len(read_all(second)) == 64
    assert _alive(watched) == 0
    assert_sums_closed(bus)


def test_the_destructor_of_an_event_may_publish(make_bus: MakeBus) -> None:
    bus = make_bus(2)
    subscription = bus.subscribe(policy="drop_oldest")

    class Talking:
        def __del__(self) -> None:
            if not bus.closed:
                bus.publish("from the destructor")

    for _ in range(3):
        bus.publish(Talking())
    received = [item for item in read_all(subscription) if isinstance(item, str)]
    assert received
    assert set(received) == {"from the destructor"}
    assert_sums_closed(bus)


@pytest.mark.parametrize("reader", ["subscribe", "subscribe_async"])
def test_dropping_the_last_handle_closes_the_subscription_and_warns(
    backend: str, reader: str
) -> None:
    with tickbus.EventBus[str](backend) as bus:
        subscriptions = [getattr(bus, reader)()]
        bus.publish("event")
        with pytest.warns(ResourceWarning):
            subscriptions.clear()
        metrics = bus.metrics()
        assert (metrics.subscriber_count, metrics.total_dropped) == (0, 1)


def _publish_new(bus: tickbus.EventBus[Any]) -> Payload:
    payload = Payload()
    bus.publish(payload)
    return payload
