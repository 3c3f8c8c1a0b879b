"""The metrics of buses, logs and risk systems for Prometheus, through `prometheus_client`.

Example:
    >>> from prometheus_client import CollectorRegistry
    >>> import tickbus
    >>> from tickbus.metrics import BusCollector
    >>> bus = tickbus.EventBus()
    >>> collector = BusCollector()
    >>> collector.add(bus, name="market")
    >>> registry = CollectorRegistry()
    >>> registry.register(collector)
    >>> bus.publish("nobody is here")
    0
    >>> registry.get_sample_value("tickbus_published_events_total", {"bus": "market"})
    1
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tickbus._metrics import LatencyHistogram, SubscriptionMetrics
from tickbus.bus import EventBus
from tickbus.errors import BusError, ConfigError
from tickbus.risk import RiskEventSystem
from tickbus.store import EventStore

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "tickbus.metrics needs prometheus_client; install it with: "
        "pip install 'tickbus[prometheus]'",
        name=_missing.name,
    ) from _missing

__all__ = ["BusCollector", "RiskCollector", "StoreCollector"]

_BUS = ("bus",)
_SUBSCRIPTION = ("bus", "subscription", "pattern", "policy")
_STORE = ("store",)
_GROUP = ("store", "group")
_CONSUMER = ("store", "consumer")
# Powers of two of nanoseconds, 128 ns to 17 s, which are bounds of the core's finer buckets.
_LATENCY_BOUNDS = tuple(2**bit / 1e9 for bit in range(7, 35))


_Source = TypeVar("_Source")
_Read = TypeVar("_Read", contravariant=True)


class _Families(Protocol[_Read]):
    """The metrics of one scrape."""

    def add(self, label: str, source: _Read, /) -> None: ...
    def all(self) -> Iterator[Metric]: ...


class _Collector(Collector, ABC, Generic[_Source]):
    """Gives the metrics of what was added, under a name each, whenever Prometheus asks."""

    _families: ClassVar[Callable[[], _Families[Any]]]
    _kind: ClassVar[type]

    def __init__(self, *sources: _Source) -> None:
        self._sources: dict[str, weakref.ref[_Source]] = {}
        for source in sources:
            self._add(source, None)

    @abstractmethod
    def _label(self, source: _Source) -> str:
        """Returns what it is called without a name."""

    def _add(self, source: _Source, name: str | None) -> None:
        if not isinstance(source, self._kind):
            wanted = self._kind.__name__
            raise TypeError(f"what was added was {source!r}; it must be an instance of {wanted}")
        label = self._label(source) if name is None else name
        if not label:
            raise ConfigError("name was ''; it must have a character, or be None")
        for known, known_label in self._alive():
            if known is source or known_label == label:
                raise ConfigError(
                    f"{source!r} was added as {label!r}, but the collector has {known!r} as "
                    f"{known_label!r}; add each bus, log or risk system once, and under a name of "
                    "its own"
                )
        sources = self._sources

        def forget(reference: weakref.ref[_Source]) -> None:
            if sources.get(label) is reference:
                del sources[label]

        sources[label] = weakref.ref(source, forget)

    def _remove(self, source: _Source) -> None:
        for known, label in self._alive():
            if known is source:
                del self._sources[label]

    def describe(self) -> Iterator[Metric]:
        """Yields the metrics without samples: what the registry compares with others' names."""
        yield from type(self)._families().all()

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics of this moment; each source of them is read once."""
        families = type(self)._families()
        for source, label in self._alive():
            # A child has the collector of its parent, not its sources; a log that is only read may
            # be damaged. One that tells nothing has no samples, and takes none from the others.
            with suppress(BusError):
                families.add(label, source)
        yield from families.all()

    def _alive(self) -> list[tuple[_Source, str]]:
        known = [(reference(), label) for label, reference in list(self._sources.items())]
        return [(source, label) for source, label in known if source is not None]


def _gauge(name: str, help: str, labels: tuple[str, ...], unit: str = "") -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tickbus_{name}", help, labels=labels, unit=unit)


def _counter(name: str, help: str, labels: tuple[str, ...], unit: str = "") -> CounterMetricFamily:
    return CounterMetricFamily(f"tickbus_{name}", help, labels=labels, unit=unit)


class _Rows:
    """Metrics that are attributes of themselves."""

    def all(self) -> Iterator[Metric]:
        yield from vars(self).values()


class _BusFamilies(_Rows):
    """The metrics of buses in one scrape."""

    def __init__(self) -> None:
        self.depth = _gauge("queue_depth", "Events that wait to be received.", _SUBSCRIPTION)
        self.capacity = _gauge("queue_capacity", "Most events that can wait.", _SUBSCRIPTION)
        self.peak = _gauge("peak_pending", "Most events that ever waited.", _SUBSCRIPTION)
        self.waiting = _gauge("waiting_publishers", "Publishers in line for room.", _SUBSCRIPTION)
        self.age = _gauge(
            "oldest_pending_age_seconds",
            "Upper bound of the time since the oldest waiting event was published, right to the "
            "interval between scrapes; 0 if none waits.",
            _SUBSCRIPTION,
            "seconds",
        )
        self.delivered = _counter(
            "delivered_events", "Events that were received.", _SUBSCRIPTION, "events"
        )
        self.dropped = _counter(
            "dropped_events",
            "Events that a subscription wanted and did not receive, by reason.",
            (*_SUBSCRIPTION, "reason"),
            "events",
        )
        self.published = _counter(
            "published_events", "Events that were published, wanted or not.", _BUS, "events"
        )
        self.lost = _counter(
            "lost_events",
            "Events that were dropped over all subscriptions of the bus and all reasons, also "
            "those of subscriptions that have left.",
            _BUS,
            "events",
        )
        self.latency = HistogramMetricFamily(
            "tickbus_publish_latency_seconds",
            "Time from the call of publish to its return, waiting included, of a random sample of "
            "the publications; the count is that of the samples.",
            labels=_BUS,
            unit="seconds",
        )

    def add(self, bus: str, source: EventBus[Any]) -> None:
        metrics = source.metrics()
        self.published.add_metric((bus,), metrics.total_published)
        self.lost.add_metric((bus,), metrics.total_dropped)
        latency = metrics.publish_latency
        self.latency.add_metric((bus,), _cumulative(latency), sum_value=latency.sum)
        for row in metrics.subscriptions:
            self._add_subscription(bus, row)

    def _add_subscription(self, bus: str, row: SubscriptionMetrics) -> None:
        labels = (bus, row.name or str(row.id), row.pattern or "", row.policy)
        self.depth.add_metric(labels, row.pending)
        self.capacity.add_metric(labels, row.capacity)
        self.peak.add_metric(labels, row.peak_pending)
        self.waiting.add_metric(labels, row.waiting_publishers)
        self.age.add_metric(labels, row.oldest_age or 0.0)
        self.delivered.add_metric(labels, row.delivered)
        for reason, count in row.dropped.items():
            self.dropped.add_metric((*labels, reason), count)


class BusCollector(_Collector["EventBus[Any]"]):
    """Gives the metrics of any number of buses whenever Prometheus asks.

    One collector serves all buses of a registry: a registry refuses a second one, because it
    would give the same metrics again. It keeps no bus alive; a bus that is gone has no series,
    and neither has a subscription that has left, while the sums of its bus go on. In a forked
    child, buses of the parent have none.

    Series of a subscription have the labels `bus`, `subscription`, `pattern` (empty without one)
    and `policy`. A bus and a subscription without a name are called by their ids. The latency
    histogram counts samples; `tickbus_published_events_total` counts publications.

    Args:
        buses: Buses to begin with, called by their ids.

    Raises:
        ConfigError: A bus was given twice.
    """

    _families = _BusFamilies
    _kind = EventBus

    def __init__(self, *buses: EventBus[Any]) -> None:
        super().__init__(*buses)

    def add(self, bus: EventBus[Any], name: str | None = None) -> None:
        """Begins to give the metrics of a bus.

        Args:
            bus: The bus; it is not kept alive.
            name: The value of its label `bus`, with something else than digits; `None` takes its
                id.

        Raises:
            TypeError: It is no bus.
            ConfigError: The collector has the bus or the name already, or the name is a number.
        """
        if name is not None and (not name or name.isdecimal()):
            raise ConfigError(
                f"name was {name!r}; it must have something else than digits, or be None"
            )
        self._add(bus, name)

    def remove(self, bus: EventBus[Any]) -> None:
        """Ends giving the metrics of a bus; one that is not there is no error."""
        self._remove(bus)

    def _label(self, source: EventBus[Any]) -> str:
        return str(source.id)


class _StoreFamilies(_Rows):
    """The metrics of logs and their groups in one scrape."""

    def __init__(self) -> None:
        self.oldest = _gauge("store_oldest_sequence", "The oldest sequence in the log.", _STORE)
        self.next = _gauge("store_next_sequence", "The sequence that the next record gets.", _STORE)
        self.durable = _gauge(
            "store_durable_sequence",
            "The last sequence up to which all records are durable; -1 if none is.",
            _STORE,
        )
        self.bytes = _gauge("store_bytes", "Bytes of all segments.", _STORE, "bytes")
        self.segments = _gauge("store_segments", "Segments.", _STORE, "segments")
        self.poisoned = _gauge(
            "store_poisoned",
            "1 if a write or a sync has failed, so that nothing is stored any more, else 0.",
            _STORE,
        )
        self.syncs = _counter("store_syncs", "How often the disk was waited for.", _STORE)
        self.sync_time = _counter(
            "store_sync_seconds", "Time that was waited for the disk.", _STORE, "seconds"
        )
        self.refused = _counter(
            "store_refused_appends",
            "Appends for which the log had no room.",
            _STORE,
            "appends",
        )
        self.missed = _counter(
            "store_missed_events",
            "Events that the log notes as gaps, and those that it had not stored when it has "
            "detached itself.",
            _STORE,
            "events",
        )
        self.detached = _counter(
            "store_detached_sources",
            "Buses and systems from which the log has detached itself, without room or poisoned.",
            _STORE,
            "sources",
        )
        self.cursor = _gauge(
            "group_cursor_sequence", "The sequence below which all records are done.", _GROUP
        )
        self.lag = _gauge(
            "group_lag_records", "Durable records that are not done.", _GROUP, "records"
        )
        self.in_flight = _gauge(
            "group_in_flight_records", "Records in the hands of consumers.", _GROUP, "records"
        )
        self.expired = _gauge(
            "group_expired", "1 if the log may lose what the group has not read, else 0.", _GROUP
        )
        self.redelivered = _counter(
            "group_redelivered_records",
            "Records that were given to a consumer again.",
            _GROUP,
            "records",
        )
        self.stalls = _counter(
            "group_stalls",
            "How often consumers had as many records as they may, and more were there.",
            _GROUP,
        )
        self.expirations = _counter(
            "group_expirations", "How often the group has expired and returned.", _GROUP
        )

    def add(self, store: str, source: EventStore) -> None:
        stats = source.stats()
        durable = -1 if stats.durable_sequence is None else stats.durable_sequence
        self.oldest.add_metric((store,), stats.oldest_sequence)
        self.next.add_metric((store,), stats.next_sequence)
        self.durable.add_metric((store,), durable)
        self.bytes.add_metric((store,), stats.bytes)
        self.segments.add_metric((store,), stats.segments)
        self.poisoned.add_metric((store,), stats.poisoned)
        self.syncs.add_metric((store,), stats.syncs)
        self.sync_time.add_metric((store,), stats.sync_seconds)
        self.refused.add_metric((store,), stats.refused)
        self.missed.add_metric((store,), stats.missed)
        self.detached.add_metric((store,), stats.detached)
        if source.read_only:
            return
        groups = []
        with suppress(BusError):  # closed or poisoned: the log says so itself
            groups = source.groups()
        for group in groups:
            labels = (store, group.name)
            self.cursor.add_metric(labels, group.cursor)
            self.lag.add_metric(labels, group.lag)
            self.in_flight.add_metric(labels, group.in_flight)
            self.expired.add_metric(labels, group.expired)
            self.redelivered.add_metric(labels, group.redelivered)
            self.stalls.add_metric(labels, group.stalled)
            self.expirations.add_metric(labels, group.expirations)


class StoreCollector(_Collector["EventStore"]):
    """Gives the metrics of any number of logs and of their groups whenever Prometheus asks.

    It is as `BusCollector`: one serves a registry, and it keeps no log alive. Series of a log have
    the label `store`, its folder unless it was added under a name, and those of a group also
    `group`. Counters begin with 0 when a log is opened. A log that another process writes can be
    read too: it has no groups here.

    Args:
        stores: Logs to begin with, called by their folders.

    Raises:
        ConfigError: A log was given twice.
    """

    _families = _StoreFamilies
    _kind = EventStore

    def __init__(self, *stores: EventStore) -> None:
        super().__init__(*stores)

    def add(self, store: EventStore, name: str | None = None) -> None:
        """Begins to give the metrics of a log.

        Args:
            store: The log; it is not kept alive.
            name: The value of its label `store`; `None` takes its folder.

        Raises:
            TypeError: It is no log.
            ConfigError: The collector has the log or the name already, or the name is empty.
        """
        self._add(store, name)

    def remove(self, store: EventStore) -> None:
        """Ends giving the metrics of a log; one that is not there is no error."""
        self._remove(store)

    def _label(self, source: EventStore) -> str:
        return str(source.path)


class _RiskFamilies(_Rows):
    """The metrics of risk systems in one scrape."""

    def __init__(self) -> None:
        self.pending = _gauge(
            "risk_pending_events",
            "Events that a consumer has not acknowledged, those in flight included.",
            _CONSUMER,
            "events",
        )
        self.in_flight = _gauge(
            "risk_in_flight_events", "Events that a consumer has been given.", _CONSUMER, "events"
        )
        self.limit = _gauge(
            "risk_in_flight_limit_events", "Events that a consumer may have.", _STORE, "events"
        )
        self.limited = _counter(
            "risk_limit_hits",
            "How often a consumer had as many events as it may, and more were there.",
            _STORE,
        )
        self.letters = _gauge("risk_dead_letters", "Dead letters that there are now.", _STORE)
        self.published = _counter(
            "risk_published_events", "Events that were published.", _STORE, "events"
        )
        self.refused = _counter(
            "risk_refused_events",
            "Events that the log refused, so that they were delivered live, without a promise.",
            _STORE,
            "events",
        )
        self.acked = _counter("risk_acks", "Acknowledgments.", _STORE)
        self.failed = _counter("risk_failed_attempts", "Attempts that failed.", _STORE, "attempts")
        self.escalated = _counter("risk_escalations", "Escalations.", _STORE)
        self.dead_lettered = _counter(
            "risk_dead_lettered_events", "Events that became dead letters.", _STORE, "events"
        )

    def add(self, store: str, source: RiskEventSystem) -> None:
        stats = source.stats()
        for consumer in stats.consumers:
            self.pending.add_metric((store, consumer.name), consumer.pending)
            self.in_flight.add_metric((store, consumer.name), consumer.in_flight)
        self.limit.add_metric((store,), source.max_in_flight)
        self.limited.add_metric((store,), stats.limited)
        self.letters.add_metric((store,), stats.dead_letters)
        self.published.add_metric((store,), stats.published)
        self.refused.add_metric((store,), stats.refused)
        self.acked.add_metric((store,), stats.acked)
        self.failed.add_metric((store,), stats.failed)
        self.escalated.add_metric((store,), stats.escalated)
        self.dead_lettered.add_metric((store,), stats.dead_lettered)


class RiskCollector(_Collector["RiskEventSystem"]):
    """Gives the metrics of any number of risk systems whenever Prometheus asks.

    It is as `BusCollector`: one serves a registry, and it keeps no system alive. Series have the
    label `store`, the folder of the log unless the system was added under a name, and those of a
    consumer also `consumer`. Counters begin with 0 when a system is opened.

    Args:
        systems: Risk systems to begin with, called by the folders of their logs.

    Raises:
        ConfigError: A system was given twice, or two of them over one folder.
    """

    _families = _RiskFamilies
    _kind = RiskEventSystem

    def __init__(self, *systems: RiskEventSystem) -> None:
        super().__init__(*systems)

    def add(self, system: RiskEventSystem, name: str | None = None) -> None:
        """Begins to give the metrics of a risk system.

        Args:
            system: The risk system; it is not kept alive.
            name: The value of its label `store`; `None` takes the folder of its log.

        Raises:
            TypeError: It is no system.
            ConfigError: The collector has the system or the name already, or the name is empty.
        """
        self._add(system, name)

    def remove(self, system: RiskEventSystem) -> None:
        """Ends giving the metrics of a risk system; one that is not there is no error."""
        self._remove(system)

    def _label(self, source: RiskEventSystem) -> str:
        return str(source.path)


def _cumulative(latency: LatencyHistogram) -> list[tuple[str, float]]:
    """Returns how many samples were not longer than each bound that Prometheus is given."""
    counts = [
        (repr(bound), sum(count for upper, count in latency.buckets if upper <= bound))
        for bound in _LATENCY_BOUNDS
    ]
    return [*counts, ("+Inf", latency.count)]
