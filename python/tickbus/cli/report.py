"""What a replay prints: tables for people, or one JSON object."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tickbus.captures import CaptureReport
from tickbus.cli.replay import ReplayOutcome, ReplayPlan
from tickbus.cli.totals import Instruments

__all__ = ["ReplayReport", "percentiles", "rows_table", "symbols_as_json", "symbols_table"]

PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """Everything that is known after a replay.

    Attributes:
        source: What was replayed, in words.
        plan: How it was replayed.
        input: What became of each message of the input.
        outcome: What happened on the bus.
        oracle: The totals of the independent pass over the input.
        others: What happened with the same events on other backends.
    """

    source: str
    plan: ReplayPlan
    input: CaptureReport
    outcome: ReplayOutcome
    oracle: Instruments
    others: tuple[ReplayOutcome, ...] = ()

    @property
    def outcomes(self) -> tuple[ReplayOutcome, ...]:
        """What happened on each backend."""
        return (self.outcome, *self.others)

    @property
    def agreeing(self) -> tuple[bool, ...]:
        """Whether each subscriber's totals equal those of the independent pass."""
        return tuple(totals == self.oracle for totals in self.outcome.totals)

    @property
    def accounted(self) -> bool:
        """Whether every message is published, ignored or malformed, and nothing was lost."""
        outside = self.input.ignored.total() + self.input.malformed
        return all(
            self.input.messages == outcome.published + outside
            and outcome.lost == 0
            and outcome.shortfalls == 0
            for outcome in self.outcomes
        )

    def differences(self) -> list[str]:
        """Returns a line for each instrument whose totals differ from the independent pass."""
        lines = []
        for outcome in self.outcomes:
            backend = f"{outcome.backend}, " if self.others else ""
            for number, totals in enumerate(outcome.totals, start=1):
                for key in sorted({*totals, *self.oracle}):
                    found, wanted = totals.get(key), self.oracle.get(key)
                    if found != wanted:
                        lines.append(
                            f"{backend}subscriber {number}, {'.'.join(key)}: "
                            f"the independent pass gives {wanted}, the subscriber summed {found}"
                        )
        return lines

    def as_json(self) -> str:
        """Returns the report as a JSON object; sums and prices are exact, in text."""
        return json.dumps(
            {
                "source": self.source,
                "backend": self.outcome.backend,
                "speed": self.plan.speed,
                "subscribers": self.plan.subscribers,
                "messages": self.input.messages,
                "published": self.outcome.published,
                "trades": self.input.trades,
                "quotes": self.input.quotes,
                "ignored": dict(sorted(self.input.ignored.items())),
                "malformed": self.input.malformed,
                "delivered": list(self.outcome.delivered),
                "lost": self.outcome.lost,
                "elapsed_seconds": round(self.outcome.elapsed_seconds, 6),
                "skipped_gaps": self.outcome.skipped_gaps,
                "events_per_second": round(self.outcome.events_per_second, 1),
                "latency_ns": percentiles(self.outcome.latencies_ns),
                "totals_agree": all(self.agreeing),
                "backends": {
                    outcome.backend: {
                        "lost": outcome.lost,
                        "events_per_second": round(outcome.events_per_second, 1),
                        "latency_ns": percentiles(outcome.latencies_ns),
                        "totals_agree": self._agrees(outcome),
                    }
                    for outcome in self.outcomes
                },
                "per_symbol": symbols_as_json(self.outcome.totals[0]),
            },
            indent=2,
        )

    def print(self, console: Console) -> None:
        """Prints the tables."""
        console.print(self._summary())
        console.print(self._subscribers())
        console.print(symbols_table(self.outcome.totals[0]))
        if self.others:
            console.print(self._backends())
        console.print(Text(self._what_is_measured()), style="dim")

    def _summary(self) -> Table:
        ignored = self.input.ignored
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(ignored.items()))
        latency = percentiles(self.outcome.latencies_ns)
        rows = {
            "messages": f"{self.input.messages:,}",
            "published": f"{self.outcome.published:,} "
            f"({self.input.trades:,} trades, {self.input.quotes:,} quotes)",
            "ignored": f"{ignored.total():,}" + (f" ({kinds})" if kinds else ""),
            "malformed": f"{self.input.malformed:,}",
            "lost": f"{self.outcome.lost:,}",
            "backend": self.outcome.backend,
            "speed": f"{self.plan.speed:g}x" if self.plan.speed else "flat out",
            "elapsed": f"{self.outcome.elapsed_seconds:.3f} s",
            "events/s": f"{self.outcome.events_per_second:,.0f} to each of "
            f"{self.plan.subscribers} subscribers",
        }
        if self.outcome.skipped_gaps:
            rows["gaps not waited for"] = f"{self.outcome.skipped_gaps:,}"
        for name, nanoseconds in latency.items():
            rows[f"latency {name}"] = _duration(nanoseconds)
        return rows_table(f"Replay of {self.source}", rows)

    def _subscribers(self) -> Table:
        table = _table("Subscribers", "subscriber", "delivered", "lost", "totals")
        for number, (count, agrees) in enumerate(
            zip(self.outcome.delivered, self.agreeing, strict=True), start=1
        ):
            lost = f"{self.outcome.published - count:,}"
            table.add_row(str(number), f"{count:,}", lost, _verdict(agrees=agrees))
        return table

    def _agrees(self, outcome: ReplayOutcome) -> bool:
        return all(totals == self.oracle for totals in outcome.totals)

    def _backends(self) -> Table:
        names = list(PERCENTILES)
        table = _table(
            "Backends, one after the other", "backend", "events/s", *names, "lost", "totals"
        )
        for outcome in self.outcomes:
            latency = percentiles(outcome.latencies_ns)
            table.add_row(
                outcome.backend,
                f"{outcome.events_per_second:,.0f}",
                *(_duration(latency[name]) for name in names),
                f"{outcome.lost:,}",
                _verdict(agrees=self._agrees(outcome)),
            )
        return table

    def _what_is_measured(self) -> str:
        text = (
            "events/s: from the first publish to the last subscriber's last sum, all input parsed "
            "beforehand, each subscriber summing in decimals in one event loop. "
            "latency: from the call of publish to the return of recv_many, over all subscribers"
        )
        if self.plan.speed == 0:
            text += "; flat out it is mostly waiting in full queues (--speed 1 or 10 shows it idle)"
        return text + "."


def rows_table(title: str, rows: dict[str, str]) -> Table:
    """Returns a table with a row for each name and its value."""
    table = _table(title, "", "")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def symbols_as_json(totals: Instruments) -> dict[str, Any]:
    """Returns the totals of each venue and symbol; sums and prices are exact, in text."""
    return {
        ".".join(key): {
            "trades": total.trades,
            "volume": f"{total.volume:f}",
            "vwap": _text(total.vwap),
            "quotes": total.quotes,
            "mean_mid": _text(total.mean_mid),
        }
        for key, total in sorted(totals.items())
    }


def symbols_table(totals: Instruments) -> Table:
    """Returns a table with a row for each venue and symbol."""
    table = _table("Symbols", "venue", "symbol", "trades", "volume", "VWAP", "quotes", "mean mid")
    for (venue, symbol), total in sorted(totals.items()):
        table.add_row(
            Text(venue),
            Text(symbol),
            f"{total.trades:,}",
            f"{total.volume.normalize():,f}",
            _rounded(total.vwap),
            f"{total.quotes:,}",
            _rounded(total.mean_mid),
        )
    return table


def percentiles(latencies_ns: Sequence[array[int]]) -> dict[str, int | None]:
    """Returns the nearest-rank percentiles over all subscribers in ns, `None` without any."""
    ordered = sorted(chain.from_iterable(latencies_ns))
    if not ordered:
        return dict.fromkeys(PERCENTILES)
    return {
        name: ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
        for name, share in PERCENTILES.items()
    }


def _verdict(*, agrees: bool) -> Text:
    if agrees:
        return Text("equal the independent pass", "green")
    return Text("DIFFER from the independent pass", "bold red")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, "bold"), title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        words = number == 0 or column in ("", "symbol", "totals")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _text(number: Decimal | None) -> str | None:
    return None if number is None else f"{number:f}"


def _rounded(number: Decimal | None) -> str:
    return "-" if number is None else f"{number:,.6f}"


def _duration(nanoseconds: int | None) -> str:
    if nanoseconds is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:,.1f} {unit}"
    return f"{nanoseconds} ns"
