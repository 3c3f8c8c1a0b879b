"""Publishing: the number, batches, what is refused, and that an exception means nobody."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

import tickbus
from support import Hole, MakeBus, assert_sums_closed, drops, read_all, row_of, run

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)


def test_the_number_is_how_many_subscriptions_took_the_event(make_bus: MakeBus) -> None:
    bus = make_bus()
    assert bus.publish("nobody") == 0
    subscriptions = [bus.subscribe() for _ in range(5)]
    assert bus.publish("all") == 5
    subscriptions.pop().close()
    assert bus.publish("those that stayed") == 4
    assert bus.metrics().total_published == 3
    assert [read_all(subscription) for subscription in subscriptions] == [
        ["all", "those that stayed"]
    ] * 4
    assert_sums_closed(bus)


def test_every_subscription_receives_the_same_object(make_bus: MakeBus) -> None:
    bus = make_bus()
    first, second = bus.subscribe(), bus.subscribe()
    event = object()
    bus.publish(event)
    assert first.recv() is event
    assert second.recv() is event


def test_publish_takes_its_arguments_by_place_and_by_name(make_bus: MakeBus) -> None:
    bus = make_bus()
    everything, trades = bus.subscribe(), bus.subscribe("trades.*")
    topic = bus.topic("trades.BTC")
    assert bus.publish(1) == bus.publish(2, None) == bus.publish(event=3) == 1
    assert bus.publish(4, "trades.BTC") == bus.publish(5, topic) == 2
    assert bus.publish(6, topic="trades.BTC") == bus.publish(topic=topic, event=7) == 2
    assert read_all(everything) == [1, 2, 3, 4, 5, 6, 7]
    assert read_all(trades) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "keywords", "said"),
    [
        ((), {}, "missing 1 required positional argument: 'event'"),
        ((1, None, 3), {}, "takes from 1 to 2 positional arguments but 3 were given"),
        ((1,), {"event": 2}, "multiple values for argument 'event'"),
        ((1,), {"subject": "a"}, "unexpected keyword argument 'subject'"),
        ((1, 2), {}, "topic was 2; it must be a str, a Topic or None"),
    ],
)
def test_wrong_arguments_are_named_and_publish_nothing(
    make_bus: MakeBus, arguments: tuple[Any, ...], keywords: dict[str, Any], said: str
) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    with pytest.raises(TypeError, match=said):
        bus.publish(*arguments, **keywords)
    assert read_all(subscription) == []
    assert bus.metrics().total_published == 0


@pytest.mark.parametrize("event", [0, "", False, (), [], float("nan"), Ellipsis])
def test_falsy_and_odd_objects_are_events(make_bus: MakeBus, event: object) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    bus.publish(event)
    assert subscription.try_recv() is event


def test_none_is_no_event(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    with pytest.raises(TypeError, match="None"):
        bus.publish(None)
    with pytest.raises(TypeError, match="None"):
        bus.publish_timeout(None, 1.0)
    with pytest.raises(TypeError, match="None"):
        run(lambda: bus.publish_async(None))
    with pytest.raises(TypeError, match="None"):
        bus.publish_many(["event", None])
    received = read_all(subscription)
    assert bus.metrics().total_published == len(received)
    assert_sums_closed(bus)


def test_publish_many_keeps_the_order_and_returns_how_many(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    subscription = bus.subscribe()
    assert bus.publish_many(range(10)) == 10
    assert bus.publish_many(event for event in range(10, 20)) == 10
    assert bus.publish_many([]) == 0
    assert read_all(subscription) == list(range(20))
    assert bus.metrics().total_published == 20
    assert_sums_closed(bus)


def test_publish_many_overwrites_like_single_publishes(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe(policy="drop_oldest")
    assert bus.publish_many(range(10)) == 10
    assert read_all(subscription) == [Hole(6), 6, 7, 8, 9]
    assert row_of(bus, subscription).dropped == drops(overwritten=6)
    assert_sums_closed(bus)


@lock_free
def test_publish_many_accepts_a_prefix_and_says_how_long_it_is(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    rejecting = bus.subscribe(policy="reject")
    roomy = bus.subscribe(capacity=64)
    with pytest.raises(tickbus.Full) as caught:
        bus.publish_many(range(10))
    assert caught.value.accepted == 4
    assert caught.value.subscriptions == (rejecting.id,)
    assert read_all(rejecting) == read_all(roomy) == [0, 1, 2, 3]
    assert bus.publish_many(range(4, 8)) == 4
    assert read_all(rejecting) == read_all(roomy) == [4, 5, 6, 7]
    assert bus.metrics().total_published == 8
    assert_sums_closed(bus)


def test_publish_many_on_a_closed_bus_says_that_nothing_was_accepted(make_bus: MakeBus) -> None:
    bus = make_bus()
    bus.close()
    with pytest.raises(tickbus.Closed) as caught:
        bus.publish_many([1, 2])
    assert caught.value.accepted == 0


def test_an_iterable_that_fails_publishes_nothing(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()

    def failing() -> Iterator[int]:
        yield 1
        raise LookupError

    with pytest.raises(LookupError):
        bus.publish_many(failing())
    assert read_all(subscription) == []
    assert bus.metrics().total_published == 0
    assert_sums_closed(bus)


def test_an_iterable_may_use_the_bus(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()

    def publishing() -> Iterator[str]:
        bus.publish("from the iterable")
        yield "from the batch"

    assert bus.publish_many(publishing()) == 1
    assert read_all(subscription) == ["from the iterable", "from the batch"]


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_duration_is_refused(make_bus: MakeBus, timeout: float) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    with pytest.raises(tickbus.ConfigError):
        bus.publish_timeout("event", timeout)
    with pytest.raises(tickbus.ConfigError):
        subscription.recv_timeout(timeout)
    assert read_all(subscription) == []


@pytest.mark.parametrize("backend", ["lock_free", "ring"], indirect=True)
def test_after_a_publish_that_timed_out_the_next_one_still_lands(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    full = bus.subscribe(policy="reject")
    bus.publish_many(range(4))
    for event in range(4, 40):
        with pytest.raises(tickbus.PublishTimeout):
            bus.publish_timeout("late", 0.0)
        assert full.recv() == event - 4
        assert bus.publish_timeout(event, 0.0) == 1
    assert read_all(full) == list(range(36, 40))
    assert row_of(bus, full).dropped == drops()
    assert_sums_closed(bus)


def test_publish_timeout_with_room_does_not_wait(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    assert bus.publish_timeout("event", 0.0) == 1
    assert read_all(subscription) == ["event"]


def test_publish_async_that_is_never_awaited_publishes_nothing(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    forgotten = bus.publish_async("event")
    forgotten.close()
    del forgotten
    assert read_all(subscription) == []
    assert bus.metrics().total_published == 0


def test_publish_async_keeps_the_order_of_its_caller(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    subscription = bus.subscribe()

    async def main() -> None:
        for event in range(50):
            assert await bus.publish_async(event) == 1

    asyncio.run(main())
    assert read_all(subscription) == list(range(50))
    assert_sums_closed(bus)


def test_the_bus_is_a_context_manager_that_closes(make_bus: MakeBus) -> None:
    with make_bus() as bus:
        subscription = bus.subscribe()
        bus.publish("event")
        assert not bus.closed
    assert bus.closed
    bus.close()
    assert list(subscription) == ["event"]


def test_a_bus_refuses_pickling(make_bus: MakeBus) -> None:
    bus = make_bus()
    with pytest.raises(TypeError):
        pickle.dumps(bus)
    with pytest.raises(TypeError):
        copy.copy(bus)
    with pytest.raises(TypeError):
        pickle.dumps(bus.subscribe())


def test_publish_many_publishes_what_the_list_had_at_the_call(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    subscription = bus.subscribe(policy="drop_oldest")
    events: list[object] = list(range(200))

    class Growing:
        """Makes the list longer when it ends, which is while others take its place."""

        def __del__(self) -> None:
            events.append("late")

    bus.publish_many(Growing() for _ in range(64))
    read_all(subscription)
    bus.publish("so that a ring need not look for room at once")
    read_all(subscription)
    del events[200:]
    assert bus.publish_many(events) == 200
    assert "late" not in read_all(subscription)
