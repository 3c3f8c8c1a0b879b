"""The table of what happens when a matching subscription has no room, cell by cell.

Every cell is reached the same way: one subscription is full, a second one has room, one more
event is published by one of the four calls. Then both are read to the end, so that each hole
is seen in its place, and the sums are closed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

import tickbus
from support import (
    BACKENDS,
    PATIENCE_WITHOUT_END,
    POLICIES,
    Hole,
    MakeBus,
    assert_holes_exact,
    assert_sums_closed,
    cancel,
    drops,
    read_all,
    read_to_the_end,
    row_of,
    run,
    spin,
)

CAPACITY = 4
PATIENCE = 0.01
"""Seconds; long enough to be a wait, short enough not to be noticed."""

Bus = tickbus.EventBus[Any]


def publish(bus: Bus, event: object) -> int:
    return bus.publish(event)


def publish_on_a_loop(bus: Bus, event: object) -> int:
    async def main() -> int:
        return bus.publish(event)

    return asyncio.run(main())


def publish_timeout(bus: Bus, event: object) -> int:
    return bus.publish_timeout(event, PATIENCE)


def publish_async(bus: Bus, event: object) -> int:
    number = run(lambda: bus.publish_async(event))
    assert isinstance(number, int)
    return number


CALLS = (publish, publish_on_a_loop, publish_timeout, publish_async)
Call = Callable[[Bus, object], int]


STRICT = "ring, strict"
"""The backend `ring` with `producers="strict"`."""


@pytest.fixture(params=[*BACKENDS, STRICT])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name.split(",")[0]


@pytest.fixture
def producers(request: pytest.FixtureRequest) -> str:
    return "strict" if request.node.callspec.params["backend"] == STRICT else "shared"


@pytest.fixture(params=CALLS, ids=lambda call: call.__name__)
def call(request: pytest.FixtureRequest) -> Call:
    chosen: Call = request.param
    return chosen


class Full:
    """A bus with a full subscription (events 0..3) and one that has been read."""

    def __init__(
        self,
        make_bus: MakeBus,
        policy: str,
        on_lag: str = "raise",
        key: Callable[[int], object] | None = None,
    ) -> None:
        self.bus = make_bus(CAPACITY, max_block_duration=PATIENCE)
        self.full = self.bus.subscribe(capacity=CAPACITY, policy=policy, on_lag=on_lag, key=key)
        self.roomy = self.bus.subscribe(capacity=CAPACITY, policy="drop_oldest")
        for event in range(CAPACITY):
            assert self.bus.publish(event) == 2
        assert read_all(self.roomy) == [0, 1, 2, 3]
        assert self.full.pending == CAPACITY

    def assert_ends(
        self, *, full: list[Any], roomy: list[Any], published: int, dropped: dict[str, int]
    ) -> None:
        """Reads, publishes a last event 9, closes, and checks everything that is left."""
        assert_sums_closed(self.bus)
        assert self.bus.metrics().total_published == published
        received, also = read_all(self.full), read_all(self.roomy)
        assert self.bus.publish(9) == 2
        self.bus.close()
        assert received + read_to_the_end(self.full) == full
        assert also + read_to_the_end(self.roomy) == roomy
        assert_sums_closed(self.bus)
        row = row_of(self.bus, self.full)
        assert dict(row.dropped) == dropped
        assert row.pending == 0
        assert row.delivered == sum(not isinstance(item, Hole) for item in full)
        assert row_of(self.bus, self.roomy).dropped == drops()
        metrics = self.bus.metrics()
        assert metrics.total_published == published + 1
        assert metrics.total_dropped == sum(dropped.values())


lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)
broadcast = pytest.mark.parametrize("backend", ["broadcast"], indirect=True)


@lock_free
def test_block_expires_and_the_others_get_the_event(make_bus: MakeBus, call: Call) -> None:
    scene = Full(make_bus, "block")
    assert call(scene.bus, 4) == 1
    scene.assert_ends(
        full=[0, 1, 2, 3, Hole(1), 9],
        roomy=[4, 9],
        published=5,
        dropped=drops(block_expired=1),
    )


@lock_free
def test_reject_gives_the_event_to_nobody(make_bus: MakeBus, call: Call) -> None:
    scene = Full(make_bus, "reject")
    waits = call in (publish_timeout, publish_async)
    with pytest.raises(tickbus.Full) as caught:
        call(scene.bus, 4)
    assert type(caught.value) is (tickbus.PublishTimeout if waits else tickbus.Full)
    assert caught.value.subscriptions == (scene.full.id,)
    scene.assert_ends(full=[0, 1, 2, 3, 9], roomy=[9], published=4, dropped=drops())


@lock_free
def test_drop_newest_misses_the_event(make_bus: MakeBus, call: Call) -> None:
    scene = Full(make_bus, "drop_newest")
    assert call(scene.bus, 4) == 1
    scene.assert_ends(
        full=[0, 1, 2, 3, Hole(1), 9], roomy=[4, 9], published=5, dropped=drops(refused=1)
    )


def test_drop_oldest_loses_its_oldest_event(make_bus: MakeBus, call: Call) -> None:
    scene = Full(make_bus, "drop_oldest")
    assert call(scene.bus, 4) == 2
    scene.assert_ends(
        full=[Hole(1), 1, 2, 3, 4, 9], roomy=[4, 9], published=5, dropped=drops(overwritten=1)
    )


def test_conflate_replaces_the_event_of_its_key(make_bus: MakeBus, call: Call) -> None:
    scene = Full(make_bus, "conflate", key=lambda event: f"key {event % 4}")
    assert call(scene.bus, 4) == 2
    # 9 has the key of 1 and 5; when it comes, everything was read.
    scene.assert_ends(full=[4, 1, 2, 3, 9], roomy=[4, 9], published=5, dropped=drops(conflated=1))


def test_conflate_loses_its_oldest_key_to_a_new_one(make_bus: MakeBus, call: Call) -> None:
    scene = Full(make_bus, "conflate", key=lambda event: f"key {event}")
    assert call(scene.bus, 4) == 2
    scene.assert_ends(
        full=[Hole(1), 1, 2, 3, 4, 9], roomy=[4, 9], published=5, dropped=drops(overwritten=1)
    )


@pytest.mark.parametrize(
    ("backend", "policy"),
    [(backend, policy) for backend, policies in POLICIES.items() for policy in policies],
    indirect=["backend"],
)
def test_an_event_for_which_there_is_room_reaches_everybody(
    make_bus: MakeBus, policy: str, call: Call
) -> None:
    bus = make_bus(CAPACITY)
    first = bus.subscribe(policy=policy)
    second = bus.subscribe(policy=policy)
    assert call(bus, "event") == 2
    assert (read_all(first), read_all(second)) == (["event"], ["event"])
    assert row_of(bus, first).delivered == row_of(bus, second).delivered == 1
    assert_sums_closed(bus)


@broadcast
@pytest.mark.parametrize("policy", ["block", "reject", "drop_newest"])
def test_broadcast_refuses_a_policy_that_it_cannot_keep(make_bus: MakeBus, policy: str) -> None:
    bus = make_bus()
    for subscribe in (bus.subscribe, bus.subscribe_async):
        with pytest.raises(tickbus.ConfigError, match="lock_free") as caught:
            subscribe(policy=policy)
        assert policy in str(caught.value)
    assert bus.metrics().subscriber_count == 0


def test_without_a_match_nobody_is_counted(make_bus: MakeBus, call: Call) -> None:
    bus = make_bus()
    assert call(bus, "event") == 0
    subscription = bus.subscribe("trades.*")
    assert call(bus, "event") == 0
    assert read_all(subscription) == []
    assert row_of(bus, subscription).offered == 0
    assert_sums_closed(bus)


def test_a_closed_bus_refuses_every_call(make_bus: MakeBus, call: Call) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    bus.publish("before")
    bus.close()
    with pytest.raises(tickbus.Closed):
        call(bus, "after")
    assert read_to_the_end(subscription) == ["before"]
    assert bus.metrics().total_published == 1


@lock_free
def test_on_lag_count_only_counts(make_bus: MakeBus, call: Call) -> None:
    for policy, reason in (("block", "block_expired"), ("drop_newest", "refused")):
        scene = Full(make_bus, policy, on_lag="count")
        assert call(scene.bus, 4) == 1
        scene.assert_ends(
            full=[0, 1, 2, 3, 9], roomy=[4, 9], published=5, dropped=drops(**{reason: 1})
        )


def test_on_lag_count_only_counts_overwritten_events(make_bus: MakeBus, call: Call) -> None:
    for policy, key in (("drop_oldest", None), ("conflate", str)):
        scene = Full(make_bus, policy, on_lag="count", key=key)
        assert call(scene.bus, 4) == 2
        scene.assert_ends(
            full=[1, 2, 3, 4, 9], roomy=[4, 9], published=5, dropped=drops(overwritten=1)
        )


@lock_free
def test_refused_events_leave_holes_of_the_right_size_in_the_right_places(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(2)
    subscription = bus.subscribe(policy="drop_newest")
    assert [bus.publish(event) for event in range(4)] == [1, 1, 0, 0]
    assert subscription.try_recv() == 0
    assert [bus.publish(event) for event in (4, 5)] == [1, 0]
    assert subscription.try_recv() == 1
    with pytest.raises(tickbus.Lagged) as caught:
        subscription.try_recv()
    assert (caught.value.missed, caught.value.exact) == (2, True)
    assert bus.publish(6) == 1
    assert read_all(subscription) == [4, Hole(1), 6]
    row = row_of(bus, subscription)
    assert (row.offered, row.delivered, row.pending) == (7, 4, 0)
    assert row.dropped == drops(refused=3)
    assert_sums_closed(bus)


def test_overwritten_events_leave_holes_of_the_right_size_in_the_right_places(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(2)
    subscription = bus.subscribe(policy="drop_oldest")
    for event in range(5):
        assert bus.publish(event) == 1
    with pytest.raises(tickbus.Lagged) as caught:
        subscription.try_recv()
    assert (caught.value.missed, caught.value.exact) == (3, True)
    assert subscription.try_recv() == 3
    for event in (5, 6, 7):
        assert bus.publish(event) == 1
    assert read_all(subscription) == [Hole(2), 6, 7]
    row = row_of(bus, subscription)
    assert (row.offered, row.delivered, row.pending) == (8, 3, 0)
    assert row.dropped == drops(overwritten=5)
    assert_sums_closed(bus)


@lock_free
def test_a_last_hole_comes_before_closed(make_bus: MakeBus) -> None:
    bus = make_bus(2)
    subscription = bus.subscribe(policy="drop_newest")
    for event in range(5):
        bus.publish(event)
    bus.close()
    assert [subscription.recv(), subscription.recv()] == [0, 1]
    with pytest.raises(tickbus.Lagged) as caught:
        subscription.recv()
    assert caught.value.missed == 3
    with pytest.raises(tickbus.Closed):
        subscription.recv()
    assert_sums_closed(bus)


@lock_free
def test_a_batch_ends_before_a_hole_between_two_events(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe(policy="drop_newest")
    for event in range(6):
        bus.publish(event)
    assert subscription.try_recv() == 0
    bus.publish(6)
    assert subscription.recv_many(100) == [1, 2, 3]
    with pytest.raises(tickbus.Lagged) as caught:
        subscription.recv_many(100)
    assert caught.value.missed == 2
    assert subscription.recv_many(100) == [6]
    assert_sums_closed(bus)


def test_a_batch_never_spans_a_hole(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe(policy="drop_oldest")
    for event in range(7):
        bus.publish(event)
    with pytest.raises(tickbus.Lagged) as caught:
        subscription.recv_many(100)
    assert caught.value.missed == 3
    assert subscription.recv_many(100) == [3, 4, 5, 6]
    assert_sums_closed(bus)


@lock_free
def test_one_subscription_without_room_does_not_take_the_room_of_another(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(8)
    narrow = bus.subscribe(capacity=2, policy="reject")
    wide = bus.subscribe(capacity=8, policy="reject")
    other = bus.subscribe(capacity=2, policy="drop_newest")
    for event in range(2):
        assert bus.publish(event) == 3
    for event in range(20):
        with pytest.raises(tickbus.Full) as caught:
            bus.publish(event)
        assert caught.value.subscriptions == (narrow.id,)
    assert read_all(narrow) == [0, 1]
    assert bus.publish(2) == 2
    assert read_all(wide) == [0, 1, 2]
    assert read_all(other) == [0, 1, Hole(1)]
    assert_sums_closed(bus)


@lock_free
def test_full_names_every_subscription_without_room(make_bus: MakeBus) -> None:
    bus = make_bus(1)
    first = bus.subscribe(policy="reject")
    second = bus.subscribe(policy="reject")
    bus.publish(0)
    with pytest.raises(tickbus.Full) as caught:
        bus.publish(1)
    assert set(caught.value.subscriptions) == {first.id, second.id}


@lock_free
def test_spent_patience_is_not_spent_again_until_the_reader_reads(make_bus: MakeBus) -> None:
    bus = make_bus(2, max_block_duration=PATIENCE_WITHOUT_END)
    subscription = bus.subscribe(policy="block")
    assert [bus.publish(0), bus.publish(1)] == [1, 1]
    assert bus.publish_timeout(2, PATIENCE) == 0
    assert [bus.publish(event) for event in range(3, 10)] == [0] * 7
    assert subscription.try_recv() == 0
    assert bus.publish(10) == 1
    assert read_all(subscription) == [1, Hole(8), 10]
    assert row_of(bus, subscription).dropped == drops(block_expired=8)
    assert_sums_closed(bus)


@lock_free
def test_a_waiting_publisher_gets_the_room_that_a_reader_frees(make_bus: MakeBus) -> None:
    bus = make_bus(2, max_block_duration=PATIENCE_WITHOUT_END)
    subscription = bus.subscribe(policy="block")
    last = 2_000
    numbers: list[int] = []

    def produce() -> None:
        numbers.extend(bus.publish(event) for event in range(last + 1))
        bus.close()

    producer = threading.Thread(target=produce)
    producer.start()
    received = read_to_the_end(subscription)
    producer.join()
    assert received == list(range(last + 1))
    assert set(numbers) == {1}
    assert row_of(bus, subscription).dropped == drops()
    assert_sums_closed(bus)


@lock_free
@pytest.mark.parametrize("policy", ["block", "reject"])
def test_publish_timeout_takes_the_room_that_a_reader_frees(make_bus: MakeBus, policy: str) -> None:
    bus = make_bus(1)
    subscription = bus.subscribe(policy=policy)
    bus.publish(0)
    numbers: list[int] = []
    producer = threading.Thread(
        target=lambda: numbers.append(bus.publish_timeout(1, PATIENCE_WITHOUT_END))
    )
    producer.start()
    assert [subscription.recv(), subscription.recv()] == [0, 1]
    producer.join()
    assert numbers == [1]
    assert_sums_closed(bus)


@lock_free
@pytest.mark.parametrize("policy", ["block", "reject"])
def test_publish_async_waits_its_turn_while_the_loop_runs(make_bus: MakeBus, policy: str) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END)
    subscription = bus.subscribe_async(policy=policy)

    async def main() -> list[int]:
        await bus.publish_async(0)
        waiting = [asyncio.create_task(bus.publish_async(event)) for event in range(1, 6)]
        await spin()
        assert not any(task.done() for task in waiting)
        received = [await subscription.recv() for _ in range(6)]
        assert await asyncio.gather(*waiting) == [1] * 5
        return received

    assert asyncio.run(main()) == list(range(6))
    assert row_of(bus, subscription).dropped == drops()
    assert_sums_closed(bus)


@lock_free
@pytest.mark.parametrize("policy", ["block", "reject"])
def test_a_cancelled_publish_async_gives_the_event_to_nobody(
    make_bus: MakeBus, policy: str
) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END)
    full = bus.subscribe_async(policy=policy)
    roomy = bus.subscribe_async(capacity=16, policy="drop_oldest")

    async def main() -> None:
        await bus.publish_async(0)
        first, second, third = (
            asyncio.create_task(bus.publish_async(event)) for event in ("a", "b", "c")
        )
        await spin()
        assert await cancel(second)
        assert [await full.recv(), await full.recv(), await full.recv()] == [0, "a", "c"]
        assert await asyncio.gather(first, third) == [2, 2]
        await spin()

    asyncio.run(main())
    assert read_all(full) == []
    assert read_all(roomy) == [0, "a", "c"]
    assert bus.metrics().total_published == 3
    assert_sums_closed(bus)


@pytest.mark.parametrize(
    ("backend", "policy"),
    [("lock_free", "drop_newest"), ("lock_free", "drop_oldest"), ("broadcast", "drop_oldest")],
    indirect=["backend"],
)
def test_holes_seen_by_a_concurrent_reader_tile_the_sequence(
    make_bus: MakeBus, policy: str
) -> None:
    bus = make_bus(8)
    subscription = bus.subscribe(policy=policy)
    last = 30_000

    def produce() -> None:
        for event in range(last + 1):
            bus.publish(event)
        bus.close()

    producer = threading.Thread(target=produce)
    producer.start()
    received = read_to_the_end(subscription)
    producer.join()
    assert_holes_exact(received, 0, last)
    row = row_of(bus, subscription)
    missed = sum(item.missed for item in received if isinstance(item, Hole))
    assert row.offered == last + 1
    assert sum(row.dropped.values()) == missed
    assert set(row.dropped) == set(drops())
    assert_sums_closed(bus)


@lock_free
def test_policy_none_means_block(make_bus: MakeBus) -> None:
    assert make_bus().subscribe().policy == "block"
    assert make_bus(drop_oldest=True).subscribe().policy == "drop_oldest"
    assert make_bus(drop_oldest=True).subscribe(policy="block").policy == "block"


@broadcast
def test_policy_none_means_drop_oldest_on_broadcast(make_bus: MakeBus) -> None:
    assert make_bus().subscribe().policy == "drop_oldest"
    assert make_bus(drop_oldest=True).subscribe_async().policy == "drop_oldest"
