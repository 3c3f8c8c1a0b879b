"""`StoreCollector` and `RiskCollector`: what Prometheus is given of logs and risk systems."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from support import run_child
from tickbus import ConfigError, Event, EventBus, EventStore, RiskEventSystem, StoreFull
from tickbus.metrics import BusCollector, RiskCollector, StoreCollector

STORE_GAUGES = {
    "tickbus_store_oldest_sequence",
    "tickbus_store_next_sequence",
    "tickbus_store_durable_sequence",
    "tickbus_store_bytes",
    "tickbus_store_segments",
    "tickbus_store_poisoned",
    "tickbus_group_cursor_sequence",
    "tickbus_group_lag_records",
    "tickbus_group_in_flight_records",
    "tickbus_group_expired",
}
STORE_COUNTERS = {
    "tickbus_store_syncs",
    "tickbus_store_sync_seconds",
    "tickbus_store_refused_appends",
    "tickbus_store_missed_events",
    "tickbus_store_detached_sources",
    "tickbus_group_redelivered_records",
    "tickbus_group_stalls",
    "tickbus_group_expirations",
}
RISK_GAUGES = {
    "tickbus_risk_pending_events",
    "tickbus_risk_in_flight_events",
    "tickbus_risk_in_flight_limit_events",
    "tickbus_risk_dead_letters",
}
RISK_COUNTERS = {
    "tickbus_risk_limit_hits",
    "tickbus_risk_published_events",
    "tickbus_risk_refused_events",
    "tickbus_risk_acks",
    "tickbus_risk_failed_attempts",
    "tickbus_risk_escalations",
    "tickbus_risk_dead_lettered_events",
}
UNITS = ("appends", "attempts", "bytes", "events", "records", "seconds", "segments", "sources")

Registry = CollectorRegistry


def _registry(*collectors: BusCollector | StoreCollector | RiskCollector) -> Registry:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


def _fill(store: EventStore) -> None:
    while True:
        store.append_many([Event(1, 0)] * 1_000)


def _value(registry: Registry, name: str, **labels: str) -> float | None:
    """Returns the value of a series as Prometheus parses it, if it is there."""
    text = generate_latest(registry).decode()
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if (sample.name, sample.labels) == (f"tickbus_{name}", labels)
    ]
    assert len(values) <= 1, "a series is there twice"
    return values[0] if values else None


def test_every_metric_has_its_type_its_help_and_its_unit(store: EventStore) -> None:
    store.group("audit")
    with RiskEventSystem(store) as risk:
        risk.register("limits")
        registry = _registry(StoreCollector(store), RiskCollector(risk))
        families = {family.name: family for family in registry.collect()}
        gauges, counters = STORE_GAUGES | RISK_GAUGES, STORE_COUNTERS | RISK_COUNTERS
        assert families.keys() == gauges | counters
        for name, family in families.items():
            assert family.type == ("gauge" if name in gauges else "counter"), name
            assert family.documentation.endswith("."), name
            unit = name.rpartition("_")[2]
            assert family.unit == (unit if unit in UNITS else ""), name
            assert family.samples, f"{name} has no series"


def test_the_series_are_the_numbers_of_the_log(store: EventStore) -> None:
    collector = StoreCollector()
    collector.add(store, name="market")
    registry = _registry(collector)
    assert _value(registry, "store_durable_sequence", store="market") == -1
    store.append_many([Event(1, 0)] * 5)
    store.append_gap(7)
    store.sync()
    stats = store.stats()
    wanted = {
        "store_oldest_sequence": 0,
        "store_next_sequence": 6,
        "store_durable_sequence": 5,
        "store_bytes": stats.bytes,
        "store_segments": 1,
        "store_poisoned": 0,
        "store_syncs_total": stats.syncs,
        "store_sync_seconds_total": stats.sync_seconds,
        "store_refused_appends_total": 0,
        "store_missed_events_total": 7,
        "store_detached_sources_total": 0,
    }
    assert {name: _value(registry, name, store="market") for name in wanted} == wanted
    assert min(stats.bytes, stats.syncs, stats.sync_seconds) > 0


def test_what_has_no_room_is_refused_and_detaches_and_is_counted(tmp_path: Path) -> None:
    limits = {"segment_bytes": 1 << 16, "max_bytes": 1 << 17}
    with EventStore.open(tmp_path / "log", **limits) as store, EventBus() as bus:
        registry = _registry(StoreCollector(store))
        label = {"store": str(store.path)}
        attachment = store.attach(bus)
        with pytest.raises(StoreFull):
            _fill(store)
        assert _value(registry, "store_refused_appends_total", **label) == 1
        with pytest.raises(StoreFull):
            store.append_durable([Event(1, 0)] * 1_000)
        assert _value(registry, "store_refused_appends_total", **label) == 2
        while attachment.attached:
            bus.publish("x" * 1_000)
        assert attachment.wait()
        assert _value(registry, "store_detached_sources_total", **label) == 1
        assert _value(registry, "store_refused_appends_total", **label) == 3
        assert _value(registry, "store_poisoned", **label) == 0


def test_a_group_has_its_numbers_and_a_log_without_one_gets_no_ledger(store: EventStore) -> None:
    registry = _registry(StoreCollector(store))
    log = str(store.path)
    assert _value(registry, "group_lag_records", store=log, group="audit") is None
    assert not (store.path / "groups").exists(), "to ask makes nothing"
    group = store.group("audit", max_in_flight=3)
    store.append_many([Event(1, 0)] * 10)
    store.sync()
    batch = group.fetch(3)
    assert group.try_fetch() is None
    labels = {"store": log, "group": "audit"}
    wanted = {
        "group_cursor_sequence": 0,
        "group_lag_records": 10,
        "group_in_flight_records": 3,
        "group_expired": 0,
        "group_redelivered_records_total": 0,
        "group_stalls_total": 1,
        "group_expirations_total": 0,
    }
    assert {name: _value(registry, name, **labels) for name in wanted} == wanted
    batch.give_back()
    group.fetch(3).commit()
    assert _value(registry, "group_redelivered_records_total", **labels) == 3
    assert _value(registry, "group_cursor_sequence", **labels) == 3
    assert _value(registry, "group_lag_records", **labels) == 7
    store.remove_group("audit")
    assert _value(registry, "group_lag_records", **labels) is None


def test_an_in_flight_limit_shows_in_the_metrics_and_calls_back(store: EventStore) -> None:
    limited = []
    with RiskEventSystem(store, max_in_flight=2, max_attempts=1, on_limit=limited.append) as risk:
        registry = _registry(RiskCollector(risk))
        log = {"store": str(store.path)}
        consumer = risk.register("limits")
        ids = [risk.publish_critical({"n": n}) for n in range(3)]
        first, second = consumer.take(), consumer.take()
        assert consumer.try_take() is None
        mine = log | {"consumer": "limits"}
        assert _value(registry, "risk_pending_events", **mine) == 3
        assert _value(registry, "risk_in_flight_events", **mine) == 2
        assert _value(registry, "risk_in_flight_limit_events", **log) == 2
        assert _value(registry, "risk_limit_hits_total", **log) == 1
        first.ack()
        second.nack("no")
        assert risk.wait_ack(ids[0], timeout=10)
        wanted = {
            "risk_published_events_total": 3,
            "risk_acks_total": 1,
            "risk_failed_attempts_total": 1,
            "risk_escalations_total": risk.stats().escalated,
            "risk_dead_lettered_events_total": 1,
            "risk_dead_letters": 1,
            "risk_refused_events_total": 0,
        }
        assert {name: _value(registry, name, **log) for name in wanted} == wanted
    assert [notice.in_flight for notice in limited] == [2]


def test_what_the_log_refuses_is_counted_by_the_risk_system(tmp_path: Path) -> None:
    limits = {"segment_bytes": 1 << 16, "max_bytes": 1 << 17}
    with (
        EventStore.open(tmp_path / "log", **limits) as store,
        RiskEventSystem(store) as risk,
    ):
        registry = _registry(RiskCollector(risk))
        consumer = risk.register("limits")
        with pytest.raises(StoreFull) as refused:
            risk.publish_critical({"x": "x" * 200_000})
        assert refused.value.delivered_live == 1
        assert consumer.take().live
        log = str(store.path)
        assert _value(registry, "risk_refused_events_total", store=log) == 1


def test_a_log_that_is_closed_or_only_read_has_its_numbers_but_no_groups(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EventStore.open(path) as store:
        store.group("audit")
        store.append(Event(1, 0))
    collector = StoreCollector()
    collector.add(store, name="closed")
    with EventStore.open(path, read_only=True) as reader:
        collector.add(reader, name="reader")
        registry = _registry(collector)
        for name in ("closed", "reader"):
            assert _value(registry, "store_next_sequence", store=name) == 1
            assert _value(registry, "group_lag_records", store=name, group="audit") is None


def test_a_log_that_cannot_be_read_takes_no_metrics_from_the_others(tmp_path: Path) -> None:
    collector = StoreCollector()
    with EventStore.open(tmp_path / "there") as store:
        store.append(Event(1, 0))
        collector.add(store, name="there")
        with EventStore.open(tmp_path / "gone") as gone:
            gone.append(Event(1, 0))
        with EventStore.open(tmp_path / "gone", read_only=True) as reader:
            collector.add(reader, name="gone")
            shutil.rmtree(tmp_path / "gone")
            registry = _registry(collector)
            assert _value(registry, "store_next_sequence", store="gone") is None
            assert _value(registry, "store_next_sequence", store="there") == 1


def test_a_log_or_a_name_is_not_taken_twice_and_is_not_kept_alive(tmp_path: Path) -> None:
    collector = StoreCollector()
    registry = _registry(collector, BusCollector(), RiskCollector())
    with EventStore.open(tmp_path / "1") as first, EventStore.open(tmp_path / "2") as second:
        collector.add(first, name="market")
        for store, name in [(first, None), (first, "other"), (second, "market")]:
            with pytest.raises(ConfigError, match="add each bus, log or risk system once"):
                collector.add(store, name)
        with pytest.raises(ConfigError, match="must have a character"):
            collector.add(second, "")
        assert _value(registry, "store_segments", store="market") is not None
        collector.remove(first)
        collector.remove(first)
        assert _value(registry, "store_segments", store="market") is None
        collector.add(first, name="market")
        with RiskEventSystem(first) as risk:
            of_risk = RiskCollector(risk)
            assert any(metric.samples for metric in of_risk.collect())
            of_risk.remove(risk)
            assert not any(metric.samples for metric in of_risk.collect())
    del first, second, store, risk
    gc.collect()
    assert _value(registry, "store_segments", store="market") is None


def test_what_has_no_such_metrics_is_refused_with_what_is_wanted(store: EventStore) -> None:
    with EventBus[int]() as bus:
        for collector, wrong in (
            (StoreCollector(), bus),
            (RiskCollector(), store),
            (BusCollector(), store),
        ):
            wanted = type(collector).__name__.replace("Collector", "")
            with pytest.raises(TypeError, match=rf"it must be an instance of \w*{wanted}"):
                collector.add(wrong)  # type: ignore[attr-defined]
            assert all(not metric.samples for metric in collector.collect())


def test_a_forked_child_gives_no_metrics_of_its_parents_logs(tmp_path: Path) -> None:
    result = run_child(f"""
        import os
        from prometheus_client import CollectorRegistry
        from tickbus import EventStore, RiskEventSystem
        from tickbus.metrics import RiskCollector, StoreCollector

        with EventStore.open({str(tmp_path / "log")!r}) as store, RiskEventSystem(store) as risk:
            registry = CollectorRegistry()
            registry.register(StoreCollector(store))
            registry.register(RiskCollector(risk))
            child = os.fork()
            if child == 0:
                samples = [sample for family in registry.collect() for sample in family.samples]
                os._exit(len(samples))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert (result.stdout, result.stderr) == ("0\n", "")
