"""`tickbus.metrics.BusCollector`: what Prometheus is given, and what it says about it."""

from __future__ import annotations

import gc
import subprocess
import weakref
from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import tickbus
from support import MakeBus, run_child
from tickbus.metrics import BusCollector

GAUGES = {
    "tickbus_queue_depth",
    "tickbus_queue_capacity",
    "tickbus_peak_pending",
    "tickbus_waiting_publishers",
    "tickbus_oldest_pending_age_seconds",
}
COUNTERS = {
    "tickbus_published_events",
    "tickbus_lost_events",
    "tickbus_delivered_events",
    "tickbus_dropped_events",
}
HISTOGRAM = "tickbus_publish_latency_seconds"

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _registry(*buses: tickbus.EventBus[Any]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(BusCollector(*buses))
    return registry


def _scrape(registry: CollectorRegistry) -> Series:
    """Returns every series of one scrape, each of which must be there once."""
    text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    names = Counter(family.name for family in families)
    assert set(names.values()) == {1}, "a metric is there twice"
    samples = [
        (sample.name, frozenset(sample.labels.items()), sample.value)
        for family in families
        for sample in family.samples
    ]
    series = {(name, labels): value for name, labels, value in samples}
    assert len(series) == len(samples), "a series is there twice"
    return series


def _value(series: Series, name: str, **labels: str) -> float:
    """Returns the value of the one series of that name with these labels among its labels."""
    (value,) = [
        value
        for (other, others), value in series.items()
        if other == name and labels.items() <= set(others)
    ]
    return value


def _used(make_bus: MakeBus) -> tickbus.EventBus[Any]:
    """Returns a bus with something in every number that its backend has."""
    bus = make_bus(4, drop_oldest=True, latency_sampling=1)
    bus.subscribe(name="risk").recv_many(bus.publish_many(range(3)))
    bus.subscribe("trades.*")
    for event in range(10):
        bus.publish(event, "trades.BTCUSDT")
    return bus


@pytest.mark.promtool
def test_promtool_has_nothing_to_object_to(make_bus: MakeBus, promtool: str) -> None:
    text = generate_latest(_registry(_used(make_bus), make_bus(8)))
    command = [promtool, "check", "metrics"]
    result = subprocess.run(command, input=text, capture_output=True, timeout=60, check=False)
    assert (result.stdout, result.stderr, result.returncode) == (b"", b"", 0)


@pytest.mark.promtool
def test_promtool_objects_to_a_metric_without_help(promtool: str) -> None:
    text = b"# TYPE tickbus_events counter\ntickbus_events 1\n"
    command = [promtool, "check", "metrics"]
    result = subprocess.run(command, input=text, capture_output=True, timeout=60, check=False)
    assert result.returncode == 3
    assert b"no help text" in result.stderr
    assert b'should have "_total" suffix' in result.stderr


def test_every_metric_has_its_type_its_help_and_its_unit(make_bus: MakeBus) -> None:
    families = {family.name: family for family in _registry(_used(make_bus)).collect()}
    assert families.keys() == GAUGES | COUNTERS | {HISTOGRAM}
    for name, family in families.items():
        wanted = "gauge" if name in GAUGES else "counter" if name in COUNTERS else "histogram"
        assert (family.type, bool(family.documentation)) == (wanted, True), name
        unit = name.rpartition("_")[2]
        assert family.unit == (unit if unit in ("seconds", "events") else ""), name
        assert family.samples, f"{name} has no series"


def test_the_series_are_the_numbers_of_the_bus(make_bus: MakeBus) -> None:
    bus = _used(make_bus)
    series = _scrape(_registry(bus))
    metrics = bus.metrics()
    assert _value(series, "tickbus_published_events_total") == metrics.total_published == 13
    assert _value(series, "tickbus_lost_events_total") == metrics.total_dropped > 0
    assert _value(series, f"{HISTOGRAM}_count") == metrics.publish_latency.count == 13
    assert _value(series, f"{HISTOGRAM}_sum") == metrics.publish_latency.sum
    for row in metrics.subscriptions:
        labels = {
            "bus": str(bus.id),
            "subscription": row.name or str(row.id),
            "pattern": row.pattern or "",
            "policy": row.policy,
        }
        assert _value(series, "tickbus_queue_depth", **labels) == row.pending
        assert _value(series, "tickbus_queue_capacity", **labels) == row.capacity
        assert _value(series, "tickbus_peak_pending", **labels) == row.peak_pending > 0
        assert _value(series, "tickbus_waiting_publishers", **labels) == 0
        assert _value(series, "tickbus_oldest_pending_age_seconds", **labels) > 0
        assert _value(series, "tickbus_delivered_events_total", **labels) == row.delivered
        for reason, count in row.dropped.items():
            name = "tickbus_dropped_events_total"
            assert _value(series, name, reason=reason, **labels) == count
    assert {row.name for row in metrics.subscriptions} == {"risk", None}


def test_latency_buckets_are_cumulative_and_end_with_the_count(make_bus: MakeBus) -> None:
    bus = make_bus(latency_sampling=1)
    bus.publish_many(range(5_000))
    series = _scrape(_registry(bus))
    buckets = sorted(
        (float(dict(labels)["le"]), value)
        for (name, labels), value in series.items()
        if name == f"{HISTOGRAM}_bucket"
    )
    counts = [value for _, value in buckets]
    assert counts == sorted(counts)
    assert buckets[-1] == (float("inf"), 5_000)
    latency = bus.metrics().publish_latency
    for bound, count in buckets:
        assert count == sum(samples for upper, samples in latency.buckets if upper <= bound)
    assert any(0 < count < 5_000 for count in counts), "all samples are in one bucket"


def test_a_subscription_that_left_has_no_series_and_its_losses_stay_in_the_bus_s_sum(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(4)
    registry = _registry(bus)
    subscription = bus.subscribe(name="risk")
    bus.publish_many(range(3))
    before = _scrape(registry)
    assert _value(before, "tickbus_queue_depth", subscription="risk") == 3
    subscription.close()
    after = _scrape(registry)
    assert not any(("subscription", "risk") in labels for _, labels in after)
    assert _value(after, "tickbus_lost_events_total") == 3
    assert _value(after, "tickbus_published_events_total") == 3
    bus.subscribe(name="risk")
    assert _value(_scrape(registry), "tickbus_lost_events_total") == 3


def test_counters_of_a_bus_never_fall_while_subscriptions_join_and_leave(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(2, drop_oldest=True)
    registry = _registry(bus)
    sums = []
    for number in range(20):
        subscription = bus.subscribe(name=f"reader {number % 3}")
        bus.publish_many(range(5))
        sums.append(_value(_scrape(registry), "tickbus_lost_events_total"))
        subscription.close()
        sums.append(_value(_scrape(registry), "tickbus_lost_events_total"))
    assert sums == sorted(sums)
    assert sums[-1] == 100


def test_one_collector_serves_several_buses_without_a_series_twice(make_bus: MakeBus) -> None:
    buses = [make_bus(4), make_bus(4), make_bus(4)]
    for bus in buses:
        bus.subscribe(name="risk")
        bus.subscribe()
        bus.publish("event")
    collector = BusCollector(*buses[:2])
    collector.add(buses[2], name="market")
    registry = CollectorRegistry()
    registry.register(collector)
    series = _scrape(registry)
    names = {dict(labels)["bus"] for _, labels in series}
    assert names == {str(buses[0].id), str(buses[1].id), "market"}
    assert _value(series, "tickbus_queue_depth", bus="market", subscription="risk") == 1
    collector.remove(buses[2])
    collector.remove(buses[2])
    assert not any(("bus", "market") in labels for _, labels in _scrape(registry))
    collector.add(buses[2], name="market")
    assert _value(_scrape(registry), "tickbus_published_events_total", bus="market") == 1


def test_a_bus_or_a_name_is_not_taken_twice(make_bus: MakeBus) -> None:
    first, second = make_bus(), make_bus()
    collector = BusCollector(first)
    collector.add(second, name="market")
    for bus, name in [(first, None), (first, "other"), (make_bus(), "market")]:
        with pytest.raises(tickbus.ConfigError, match="add each bus, log or risk system once"):
            collector.add(bus, name)
    for name in ("", "17"):
        with pytest.raises(tickbus.ConfigError, match="something else than digits"):
            collector.add(make_bus(), name)


def test_a_registry_refuses_a_second_collector(make_bus: MakeBus) -> None:
    registry = _registry(make_bus())
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(BusCollector(make_bus()))
    other = _registry(make_bus())
    assert _scrape(other)


def test_a_collector_keeps_no_bus_alive(backend: str) -> None:
    collector = BusCollector()
    registry = CollectorRegistry()
    registry.register(collector)
    bus: tickbus.EventBus[Any] = tickbus.EventBus(backend)
    collector.add(bus, name="market")
    assert _value(_scrape(registry), "tickbus_published_events_total", bus="market") == 0
    del bus
    gc.collect()
    text = generate_latest(registry).decode()
    assert 'bus="market"' not in text
    bus = tickbus.EventBus(backend)
    collector.add(bus, name="market")
    assert _value(_scrape(registry), "tickbus_published_events_total", bus="market") == 0
    bus.close()
    assert _value(_scrape(registry), "tickbus_published_events_total", bus="market") == 0


def test_a_name_that_is_given_away_while_its_bus_goes_stays_with_the_new_one(
    backend: str,
) -> None:
    collector = BusCollector()
    registry = CollectorRegistry()
    registry.register(collector)
    bus, heir = tickbus.EventBus[Any](backend), tickbus.EventBus[Any](backend)

    def inherit(_: object) -> None:
        if not heirs:
            heirs.append(heir)
            collector.add(heir, name="market")

    # Whichever of the callbacks of weak references comes first, one of these precedes the
    # collector's and one follows it.
    heirs: list[Any] = []
    before = weakref.ref(bus, inherit)
    collector.add(bus, name="market")
    after = weakref.ref(bus, inherit)
    del bus
    gc.collect()
    assert heirs == [heir]
    assert before() is after() is None
    assert _value(_scrape(registry), "tickbus_published_events_total", bus="market") == 0
    heir.close()


def test_a_forked_child_gives_the_metrics_of_its_own_buses_only() -> None:
    result = run_child("""
        import os
        import tickbus
        from prometheus_client import CollectorRegistry
        from tickbus.metrics import BusCollector

        published = "tickbus_published_events_total"
        parents, collector, registry = tickbus.EventBus(), BusCollector(), CollectorRegistry()
        collector.add(parents, name="parent's")
        registry.register(collector)
        parents.publish("event")
        child = os.fork()
        if child == 0:
            own = tickbus.EventBus()
            collector.add(own, name="child's")
            values = [registry.get_sample_value(published, {"bus": f"{whose}'s"})
                      for whose in ("parent", "child")]
            os._exit(values != [None, 0])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(registry.get_sample_value(published, {"bus": "parent's"}))
    """)
    assert (result.stdout, result.stderr) == ("0\n1\n", "")


def test_without_prometheus_client_the_import_says_what_to_install() -> None:
    result = run_child("""
        import sys
        sys.modules["prometheus_client"] = None
        import tickbus
        try:
            import tickbus.metrics
        except ModuleNotFoundError as error:
            print(error)
    """)
    wanted = "tickbus.metrics needs prometheus_client; install it with: "
    wanted += "pip install 'tickbus[prometheus]'\n"
    assert (result.stdout, result.stderr) == (wanted, "")
