"""The blocking subscription: receiving, batches, timeouts, iteration, the end."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import tickbus
from support import (
    Hole,
    MakeBus,
    assert_sums_closed,
    drops,
    read_all,
    row_of,
)


def test_what_was_asked_for_is_shown(make_bus: MakeBus, backend: str) -> None:
    bus = make_bus(16)
    first = bus.subscribe()
    second = bus.subscribe_async("trades.*", policy="drop_oldest", on_lag="count")
    assert first.id != second.id
    assert (first.pattern, second.pattern) == (None, "trades.*")
    assert (first.on_lag, second.on_lag) == ("raise", "count")
    assert second.policy == "drop_oldest"
    assert first.capacity == second.capacity == bus.capacity == 16
    assert bus.backend == backend
    assert not first.closed
    assert not second.closed


def test_events_are_received_in_the_order_in_which_they_were_published(make_bus: MakeBus) -> None:
    bus = make_bus(16)
    subscription = bus.subscribe()
    for event in range(10):
        bus.publish(event)
    assert subscription.pending == 10
    assert [subscription.recv() for _ in range(10)] == list(range(10))
    assert subscription.pending == 0
    assert_sums_closed(bus)


def test_try_recv_is_none_when_empty_and_closed_after_the_end(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    assert subscription.try_recv() is None
    bus.publish("event")
    bus.close()
    assert subscription.try_recv() == "event"
    with pytest.raises(tickbus.Closed):
        subscription.try_recv()


def test_the_last_batch_before_the_close_is_read_in_full(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    bus.publish_many(range(7))
    bus.close()
    assert [subscription.recv_many(5), subscription.recv_many(5)] == [[0, 1, 2, 3, 4], [5, 6]]
    with pytest.raises(tickbus.Closed):
        subscription.recv_many(5)


def test_who_leaves_and_comes_again_gets_nothing_twice(make_bus: MakeBus) -> None:
    bus = make_bus()
    received = []
    for first in (0, 5, 10):
        with bus.subscribe() as subscription:
            bus.publish_many(range(first, first + 5))
            received += subscription.recv_many(3)
    assert received == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert bus.metrics().total_dropped == 6


def test_a_subscription_that_is_refused_leaves_nothing_behind(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    kept = bus.subscribe("trades.*", name="kept")
    refused: list[dict[str, Any]] = [
        {"name": "kept"},
        {"policy": "drop_newest", "capacity": 0},
        {"pattern": "trades.", "policy": "conflate"},
        {"policy": "drop_oldest", "snapshot": True},
        {"policy": "drop_oldest", "key": id},
    ]
    for number, wishes in enumerate(refused):
        with pytest.raises(tickbus.ConfigError):
            bus.subscribe(**wishes)
        assert bus.metrics().subscriber_count == 1
        assert bus.publish(number, "trades.BTCUSDT") == 1
        assert kept.recv() == number
    later = bus.subscribe(name="later")
    assert bus.publish("event", "trades.BTCUSDT") == 2
    assert read_all(kept) == read_all(later) == ["event"]
    assert_sums_closed(bus)


def test_recv_timeout_says_that_nothing_came(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    for timeout in (0.0, 0.001):
        with pytest.raises(tickbus.ReceiveTimeout):
            subscription.recv_timeout(timeout)
    bus.publish("event")
    assert subscription.recv_timeout(0.0) == "event"
    bus.close()
    with pytest.raises(tickbus.Closed):
        subscription.recv_timeout(60.0)


def test_recv_waits_for_the_next_event(make_bus: MakeBus) -> None:
    bus = make_bus(2_048)
    there, back = bus.subscribe("there"), bus.subscribe("back")

    def answer() -> None:
        for event in there:
            bus.publish(event, "back")

    answering = threading.Thread(target=answer)
    answering.start()
    for event in range(500):
        bus.publish(event, "there")
        assert back.recv() == event
    bus.close()
    answering.join()
    assert_sums_closed(bus)


def test_recv_many_waits_for_the_first_and_takes_what_is_there(make_bus: MakeBus) -> None:
    bus = make_bus(16)
    subscription = bus.subscribe()
    bus.publish_many(range(6))
    assert subscription.recv_many(4) == [0, 1, 2, 3]
    assert subscription.recv_many(4) == [4, 5]
    batches: list[list[int]] = []
    reader = threading.Thread(target=lambda: batches.append(subscription.recv_many(4)))
    reader.start()
    bus.publish(6)
    reader.join()
    assert batches == [[6]]
    assert_sums_closed(bus)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_batch_of_nothing_is_refused(make_bus: MakeBus, limit: int) -> None:
    bus = make_bus()
    subscription, also = bus.subscribe(), bus.subscribe_async()
    bus.publish("event")
    with pytest.raises(tickbus.ConfigError):
        subscription.recv_many(limit)
    with pytest.raises(tickbus.ConfigError):
        also.recv_many(limit)
    assert (subscription.pending, also.pending) == (1, 1)


def test_iteration_ends_after_the_close_when_everything_was_read(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    bus.publish_many(range(5))
    bus.close()
    assert list(subscription) == [0, 1, 2, 3, 4]
    assert list(subscription) == []
    assert_sums_closed(bus)


def test_lagged_out_of_a_for_loop_leaves_the_subscription_open(make_bus: MakeBus) -> None:
    bus = make_bus(2)
    subscription = bus.subscribe(policy="drop_oldest")
    bus.publish_many(range(5))
    with pytest.raises(tickbus.Lagged) as caught:
        list(subscription)
    assert caught.value.missed == 3
    assert not subscription.closed
    bus.publish(5)
    bus.close()
    assert list(read_all(subscription)) == [Hole(1), 4, 5]
    assert_sums_closed(bus)


def test_closing_a_subscription_counts_its_pending_events_as_closed(make_bus: MakeBus) -> None:
    bus = make_bus()
    leaving, staying = bus.subscribe(), bus.subscribe()
    bus.publish_many(range(5))
    assert leaving.recv() == 0
    leaving.close()
    leaving.close()
    assert leaving.closed
    with pytest.raises(tickbus.Closed):
        leaving.recv()
    with pytest.raises(tickbus.Closed):
        leaving.try_recv()
    assert list(leaving) == []
    metrics = bus.metrics()
    assert (metrics.subscriber_count, metrics.total_dropped) == (1, 4)
    assert bus.publish(5) == 1
    assert read_all(staying) == [0, 1, 2, 3, 4, 5]
    assert row_of(bus, staying).dropped == drops()
    assert_sums_closed(bus)


def test_a_subscription_is_a_context_manager_that_closes(make_bus: MakeBus) -> None:
    bus = make_bus()
    with bus.subscribe() as subscription:
        bus.publish("event")
        assert subscription.recv() == "event"
    assert subscription.closed
    assert not bus.closed


def test_after_the_bus_is_closed_nobody_subscribes(make_bus: MakeBus) -> None:
    bus = make_bus()
    bus.close()
    with pytest.raises(tickbus.Closed):
        bus.subscribe()
    with pytest.raises(tickbus.Closed):
        bus.subscribe_async()


def test_a_subscription_sees_nothing_from_before_it_joined(make_bus: MakeBus) -> None:
    bus = make_bus()
    first = bus.subscribe()
    bus.publish("before")
    second = bus.subscribe()
    bus.publish("after")
    assert read_all(first) == ["before", "after"]
    assert read_all(second) == ["after"]
    assert row_of(bus, second).offered == 1
    assert_sums_closed(bus)


def test_metrics_are_a_frozen_snapshot(make_bus: MakeBus) -> None:
    bus = make_bus(16)
    first, second = bus.subscribe(), bus.subscribe("trades.>")
    bus.publish_many(range(4))
    assert first.recv() == 0
    metrics = bus.metrics()
    assert metrics.total_published == 4
    assert metrics.total_dropped == 0
    assert metrics.subscriber_count == 2
    row = row_of(bus, first)
    assert (row.offered, row.delivered, row.pending, row.capacity) == (4, 1, 3, 16)
    assert row.pattern is None
    assert row_of(bus, second).pattern == "trades.>"
    assert {row.id for row in metrics.subscriptions} == {first.id, second.id}
    with pytest.raises(AttributeError):
        metrics.total_published = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        row.dropped["refused"] = 1  # type: ignore[index]
    bus.publish("later")
    assert metrics.total_published == 4


def test_the_average_queue_depth_is_the_mean_over_open_subscriptions(make_bus: MakeBus) -> None:
    bus = make_bus(16)
    assert bus.metrics().avg_queue_depth == 0.0
    first = bus.subscribe()
    bus.publish_many(range(4))
    second = bus.subscribe()
    assert bus.metrics().avg_queue_depth == 2.0
    first.close()
    assert bus.metrics().avg_queue_depth == 0.0
    bus.publish("event")
    assert bus.metrics().avg_queue_depth == 1.0
    assert second.recv() == "event"
