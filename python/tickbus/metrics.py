"""The metrics of buses for Prometheus, through `prometheus_client`.

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
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tickbus._metrics import EventBusMetrics, LatencyHistogram, SubscriptionMetrics
from tickbus.errors import ConfigError, ForkedError

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

if TYPE_CHECKING:
    from tickbus.bus import EventBus

__all__ = ["BusCollector"]

_BUS = ("bus",)
_SUBSCRIPTION = ("bus", "subscription", "pattern", "policy")
# Powers of two of nanoseconds, 128 ns to 17 s, which are bounds of the core's finer buckets.
_LATENCY_BOUNDS = tuple(2**bit / 1e9 for bit in range(7, 35))


class BusCollector(Collector):
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

    def __init__(self, *buses: EventBus[Any]) -> None:
        self._buses: dict[str, weakref.ref[EventBus[Any]]] = {}
        for bus in buses:
            self.add(bus)

    def add(self, bus: EventBus[Any], name: str | None = None) -> None:
        """Begins to give the metrics of a bus.

        Args:
            bus: The bus; it is not kept alive.
            name: The value of its label `bus`, with something else than digits; `None` takes its
                id.

        Raises:
            ConfigError: The collector has the bus or the name already, or the name is a number.
        """
        if name is not None and (not name or name.isdecimal()):
            raise ConfigError(
                f"name was {name!r}; it must have something else than digits, or be None"
            )
        label = str(bus.id) if name is None else name
        for known, known_label in self._alive():
            if known is bus or known_label == label:
                raise ConfigError(
                    f"bus {bus.id} was added as {label!r}, but the collector has bus {known.id} as "
                    f"{known_label!r}; add each bus once, and under a name of its own"
                )
        buses = self._buses

        def forget(reference: weakref.ref[EventBus[Any]]) -> None:
            if buses.get(label) is reference:
                del buses[label]

        buses[label] = weakref.ref(bus, forget)

    def remove(self, bus: EventBus[Any]) -> None:
        """Ends giving the metrics of a bus; one that is not there is no error."""
        for known, label in self._alive():
            if known is bus:
                del self._buses[label]

    def describe(self) -> Iterator[Metric]:
        """Yields the metrics without samples: what the registry compares with others' names."""
        yield from _Families().all()

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics of this moment; each bus is read once."""
        families = _Families()
        for bus, label in self._alive():
            with suppress(ForkedError):  # a child has the collector of its parent, not its buses
                families.add(label, bus.metrics())
        yield from families.all()

    def _alive(self) -> list[tuple[EventBus[Any], str]]:
        known = [(reference(), label) for label, reference in list(self._buses.items())]
        return [(bus, label) for bus, label in known if bus is not None]


class _Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self.depth = GaugeMetricFamily(
            "tickbus_queue_depth", "Events that wait to be received.", labels=_SUBSCRIPTION
        )
        self.capacity = GaugeMetricFamily(
            "tickbus_queue_capacity", "Most events that can wait.", labels=_SUBSCRIPTION
        )
        self.peak = GaugeMetricFamily(
            "tickbus_peak_pending", "Most events that ever waited.", labels=_SUBSCRIPTION
        )
        self.waiting = GaugeMetricFamily(
            "tickbus_waiting_publishers", "Publishers in line for room.", labels=_SUBSCRIPTION
        )
        self.age = GaugeMetricFamily(
            "tickbus_oldest_pending_age_seconds",
            "Upper bound of the time since the oldest waiting event was published, right to the "
            "interval between scrapes; 0 if none waits.",
            labels=_SUBSCRIPTION,
            unit="seconds",
        )
        self.delivered = CounterMetricFamily(
            "tickbus_delivered_events",
            "Events that were received.",
            labels=_SUBSCRIPTION,
            unit="events",
        )
        self.dropped = CounterMetricFamily(
            "tickbus_dropped_events",
            "Events that a subscription wanted and did not receive, by reason.",
            labels=(*_SUBSCRIPTION, "reason"),
            unit="events",
        )
        self.published = CounterMetricFamily(
            "tickbus_published_events",
            "Events that were published, wanted or not.",
            labels=_BUS,
            unit="events",
        )
        self.lost = CounterMetricFamily(
            "tickbus_lost_events",
            "Events that were dropped over all subscriptions of the bus and all reasons, also "
            "those of subscriptions that have left.",
            labels=_BUS,
            unit="events",
        )
        self.latency = HistogramMetricFamily(
            "tickbus_publish_latency_seconds",
            "Time from the call of publish to its return, waiting included, of a random sample of "
            "the publications; the count is that of the samples.",
            labels=_BUS,
            unit="seconds",
        )

    def all(self) -> Iterator[Metric]:
        yield from vars(self).values()

    def add(self, bus: str, metrics: EventBusMetrics) -> None:
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


def _cumulative(latency: LatencyHistogram) -> list[tuple[str, float]]:
    """Returns how many samples were not longer than each bound that Prometheus is given."""
    counts = [
        (repr(bound), sum(count for upper, count in latency.buckets if upper <= bound))
        for bound in _LATENCY_BOUNDS
    ]
    return [*counts, ("+Inf", latency.count)]
