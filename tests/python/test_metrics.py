"""What a bus says about itself: peaks, ages, latencies, and who stops the publishers."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from typing import Any

import pytest

import tickbus
from support import (
    PATIENCE_WITHOUT_END,
    MakeBus,
    assert_sums_closed,
    drops,
    read_all,
    row_of,
    run,
    spin,
)

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)


def _until(condition: Any) -> None:
    """Waits until the condition holds; a test in which it never does is ended by its timeout."""
    while not condition():
        time.sleep(0)


def test_the_peak_is_the_most_that_ever_waited_whatever_was_read_since(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    subscription = bus.subscribe()
    peak = 0
    for published, read in [(3, 3), (2, 1), (1, 2), (5, 4), (7, 8), (20, 20), (1, 1)]:
        bus.publish_many(range(published))
        peak = max(peak, subscription.pending)
        assert row_of(bus, subscription).peak_pending == peak
        assert len(subscription.recv_many(read)) == read
        assert row_of(bus, subscription).peak_pending == peak
    assert (peak, subscription.pending) == (20, 0)
    assert_sums_closed(bus)


def test_a_peak_that_nobody_looked_at_is_remembered(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    subscription = bus.subscribe()
    bus.publish_many(range(10))
    assert subscription.recv_many(100) == list(range(10))
    bus.publish_many(range(3))
    assert row_of(bus, subscription).peak_pending == 10


def test_the_oldest_age_is_right_to_the_interval_between_two_looks(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    subscription = bus.subscribe()

    def assert_between(looked: float, published: float) -> None:
        least = time.monotonic() - published
        age = row_of(bus, subscription).oldest_age
        assert age is not None
        assert least <= age <= time.monotonic() - looked

    looked = time.monotonic()
    assert row_of(bus, subscription).oldest_age is None
    bus.publish("first")
    assert_between(looked, time.monotonic())
    looked = time.monotonic()
    bus.explain()
    bus.publish("second")
    published = time.monotonic()
    assert subscription.recv() == "first"
    assert_between(looked, published)
    assert subscription.recv() == "second"
    assert row_of(bus, subscription).oldest_age is None


@pytest.mark.parametrize(("sampling", "samples"), [(None, 0), (1, 46)])
def test_every_way_of_publishing_is_measured(
    make_bus: MakeBus, sampling: int | None, samples: int
) -> None:
    bus = make_bus(64, latency_sampling=sampling)
    subscription = bus.subscribe()
    topic = bus.topic("trades")
    for event in range(10):
        bus.publish(event)
        bus.publish(event, "trades")
        bus.publish(event, topic=topic)
    bus.publish_many(range(10))
    for event in range(5):
        bus.publish_timeout(event, 1.0)
    run(lambda: bus.publish_async("last"))
    metrics = bus.metrics()
    assert metrics.total_published == 46
    assert len(read_all(subscription)) == 46
    latency = metrics.publish_latency
    assert latency.count == samples
    assert (latency.sum > 0) == (samples > 0)
    assert (latency.quantile(0.5) is not None) == (samples > 0)


def test_latencies_are_measured_without_asking_for_it(backend: str) -> None:
    with tickbus.EventBus[int](backend) as bus:
        _until(lambda: bus.publish_many(range(128)) and bus.metrics().publish_latency.count > 0)
        metrics = bus.metrics()
        assert metrics.publish_latency.count < metrics.total_published


@lock_free
def test_the_time_that_a_publish_waited_for_room_is_in_its_latency(make_bus: MakeBus) -> None:
    patience = 0.02
    bus = make_bus(1, max_block_duration=patience, latency_sampling=1)
    bus.subscribe(policy="block")
    assert (bus.publish("first"), bus.publish("second")) == (1, 0)
    latency = bus.metrics().publish_latency
    assert (latency.count, latency.buckets[-1][1]) == (2, 1)
    assert latency.sum >= patience
    assert latency.buckets[-1][0] >= patience
    longest = latency.quantile(1.0)
    assert longest is not None
    assert longest >= patience


@lock_free
def test_the_time_that_a_task_waited_for_room_is_in_its_latency(make_bus: MakeBus) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END, latency_sampling=1)
    subscription = bus.subscribe_async(policy="block")

    async def main() -> float:
        bus.publish("first")
        task = asyncio.create_task(bus.publish_async("second"))
        await spin()
        assert row_of(bus, subscription).waiting_publishers == 1
        start = time.monotonic()
        await asyncio.sleep(0.01)
        waited = time.monotonic() - start
        assert await subscription.recv() == "first"
        assert await task == 1
        return waited

    waited = asyncio.run(main())
    latency = bus.metrics().publish_latency
    assert latency.count == 2
    assert latency.buckets[-1][0] >= waited
    assert latency.sum >= waited


@lock_free
def test_a_publish_that_failed_is_not_measured(make_bus: MakeBus) -> None:
    bus = make_bus(1, latency_sampling=1)
    bus.subscribe(policy="reject")
    bus.publish("first")
    with pytest.raises(tickbus.Full):
        bus.publish("second")
    with pytest.raises(tickbus.PublishTimeout):
        bus.publish_timeout("second", 0.0)
    with pytest.raises(TypeError):
        bus.publish(None)
    assert bus.metrics().publish_latency.count == 1


def test_buckets_rise_and_quantiles_follow_them(make_bus: MakeBus) -> None:
    bus = make_bus(64, latency_sampling=1)
    bus.publish_many(range(10_000))
    latency = bus.metrics().publish_latency
    bounds = [upper for upper, _ in latency.buckets]
    assert bounds == sorted(set(bounds))
    assert all(count > 0 for _, count in latency.buckets)
    assert sum(count for _, count in latency.buckets) == latency.count == 10_000
    most = sum(upper * count for upper, count in latency.buckets)
    assert most * 7 / 8 <= latency.sum <= most
    assert latency.quantile(0.0) == bounds[0]
    assert latency.quantile(1.0) == bounds[-1]
    quantiles = [latency.quantile(step / 100) for step in range(101)]
    assert quantiles == sorted(quantiles, key=lambda q: q or 0.0)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"q was .*between 0\.0 and 1\.0"):
            latency.quantile(bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "often"])
def test_a_sampling_that_makes_no_sense_is_refused(backend: str, bad: Any) -> None:
    with pytest.raises(tickbus.ConfigError, match="latency_sampling was"):
        tickbus.EventBus(backend, latency_sampling=bad)


@pytest.mark.parametrize("bus_class", [tickbus.LockFreeEventBus, tickbus.BroadcastEventBus])
def test_each_class_takes_a_sampling(bus_class: Any) -> None:
    with bus_class(latency_sampling=1) as bus:
        bus.publish("event")
        assert bus.metrics().publish_latency.count == 1


def test_an_idle_bus_has_nobody_who_stops_publishers(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    assert str(bus.explain()) == f"bus {bus.id}: nothing stops publishers"
    subscription = bus.subscribe("trades.*", name="risk")
    explanation = bus.explain()
    assert (explanation.bus, explanation.closed, explanation.gating) == (bus.id, False, ())
    (row,) = explanation.subscriptions
    assert (row.name, row.pattern, row.policy) == ("risk", "trades.*", subscription.policy)
    assert (row.pending, row.capacity, row.room) == (0, 4, 4)
    assert (row.waiting_publishers, row.full_for, row.oldest_age) == (0, None, None)
    line = f"  risk (trades.*): {subscription.policy}, 0 of 4 pending"
    assert str(explanation).splitlines()[1:] == [line]
    bus.close()
    assert bus.explain().closed
    assert str(bus.explain()).startswith(f"bus {bus.id}: closed\n")
    assert str(explanation).startswith(f"bus {bus.id}: nothing"), "a snapshot stays as it was"


@lock_free
@pytest.mark.parametrize("policy", ["block", "reject", "drop_newest", "drop_oldest"])
def test_a_full_subscription_stops_publishers_by_block_and_reject_alone(
    make_bus: MakeBus, policy: Any
) -> None:
    bus = make_bus(2)
    full = bus.subscribe(policy=policy)
    bus.subscribe(capacity=4, policy=policy)
    bus.publish_many(range(2))
    stops = policy in ("block", "reject")
    assert bus.explain().gating == ((full.id,) if stops else ())
    assert [row.is_gating for row in bus.explain().subscriptions] == [stops, False]
    assert [row.room for row in bus.explain().subscriptions] == [0, 2]
    full.recv()
    assert bus.explain().gating == ()


def test_broadcast_stops_nobody() -> None:
    with tickbus.BroadcastEventBus(2) as bus, bus.subscribe() as slow:
        bus.publish_many(range(9))
        assert (slow.pending, bus.explain().gating) == (2, ())


@lock_free
def test_a_waiting_publisher_is_explained_with_whom_it_waits_for_and_since_when(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END)
    slow = bus.subscribe(name="risk")
    bus.subscribe(capacity=8, name="log")
    bus.publish(0)
    before = time.monotonic()
    threads = [threading.Thread(target=bus.publish, args=(event,)) for event in (1, 2)]
    for thread in threads:
        thread.start()
    _until(lambda: row_of(bus, slow).waiting_publishers == 2)
    waiting_since = time.monotonic()
    least = time.monotonic() - waiting_since
    explanation = bus.explain()
    row = explanation.subscriptions[0]
    assert explanation.gating == (slow.id,)
    assert row.full_for is not None
    assert least <= row.full_for <= time.monotonic() - before
    first, risk, log = str(explanation).splitlines()
    assert first == f"bus {bus.id}: risk stops publishers"
    assert risk.startswith("  risk: block, 1 of 1 pending, the oldest for at most ")
    assert ", full for " in risk
    assert risk.endswith(" s, 2 publishers wait")
    assert log.startswith("  log: block, 1 of 8 pending")
    assert sorted(slow.recv() for _ in range(3)) == [0, 1, 2]
    for thread in threads:
        thread.join()
    row = row_of(bus, slow)
    assert (row.waiting_publishers, row.full_for, row.is_gating) == (0, None, False)


@lock_free
def test_a_dead_reader_is_passed_over_and_no_longer_stops_publishers(make_bus: MakeBus) -> None:
    bus = make_bus(1)
    dead = bus.subscribe(policy="block")
    assert (bus.publish(0), bus.publish_timeout(1, 0.001)) == (1, 0)
    row = row_of(bus, dead)
    assert (row.is_passed_over, row.is_gating) == (True, False)
    assert bus.explain().gating == ()
    assert str(bus.explain()).endswith(", passed over until it reads, 1 lost")
    assert dead.recv() == 0
    assert bus.publish(2) == 1
    row = row_of(bus, dead)
    assert (row.is_passed_over, row.is_gating) == (False, True)
    assert row.dropped == drops(block_expired=1)


def test_a_name_is_unique_among_those_who_are_here_and_no_number(make_bus: MakeBus) -> None:
    bus = make_bus()
    first = bus.subscribe(name="risk")
    assert first.name == row_of(bus, first).name == "risk"
    for bad in ("risk", "", "17"):
        with pytest.raises(tickbus.ConfigError, match=f'name was "{bad}"'):
            bus.subscribe_async(name=bad)
    assert bus.metrics().subscriber_count == 1
    first.close()
    assert bus.subscribe_async(name="risk").name == "risk"
    assert bus.subscribe().name is None


def test_metrics_and_explanations_can_be_copied_and_pickled(make_bus: MakeBus) -> None:
    bus = make_bus(latency_sampling=1)
    bus.subscribe(name="risk")
    bus.publish("event")
    for snapshot in (bus.metrics(), bus.explain()):
        assert pickle.loads(pickle.dumps(snapshot)) == snapshot
        assert copy.deepcopy(snapshot) == snapshot
        assert str(pickle.loads(pickle.dumps(snapshot))) == str(snapshot)
    row = pickle.loads(pickle.dumps(bus.metrics().subscriptions[0]))
    with pytest.raises(TypeError):
        row.dropped["refused"] = 1
