"""What the commands about event logs print: tables, or one JSON object."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tickbus import Corrupt, Verification
from tickbus.captures import CaptureReport
from tickbus.cli.export import Exported
from tickbus.cli.record import Recorded
from tickbus.cli.record_live import LiveRecorded
from tickbus.cli.replay import ReplayPlan
from tickbus.cli.replay_log import LogOutcome
from tickbus.cli.report import rows_table, symbols_as_json, symbols_table
from tickbus.cli.totals import Instruments
from tickbus.store import Salvage, SegmentReport

__all__ = [
    "ExportReport",
    "InspectReport",
    "LiveReport",
    "LogReplayReport",
    "NumbersReport",
    "RecordReport",
    "RepairReport",
    "VerifyReport",
]


class NumbersReport(ABC):
    """Numbers under a title, as a table or as a JSON object that may have more."""

    __slots__ = ()

    @abstractmethod
    def _title(self) -> str:
        """Returns what stands above the table."""

    @abstractmethod
    def _numbers(self) -> dict[str, Any]:
        """Returns what both have, by names in snake_case."""

    def _details(self) -> dict[str, Any]:
        """Returns what only the JSON object has."""
        return {}

    def _below(self) -> Iterable[RenderableType]:
        """Returns what is printed below the table."""
        return ()

    def as_json(self) -> str:
        """Returns the report as a JSON object."""
        return json.dumps(self._numbers() | self._details(), indent=2)

    def print(self, console: Console) -> None:
        """Prints a table, and what is to stand below it."""
        rows = {name.replace("_", " "): _shown(value) for name, value in self._numbers().items()}
        console.print(rows_table(self._title(), rows))
        for each in self._below():
            console.print(each)


@dataclass(frozen=True, slots=True)
class RecordReport(NumbersReport):
    """What `tickbus record` did."""

    source: str
    log: Path
    input: CaptureReport
    recorded: Recorded

    def _title(self) -> str:
        return f"Recorded into {self.log}"

    def _numbers(self) -> dict[str, Any]:
        sequences = self.recorded.sequences
        return {
            "source": self.source,
            "log": str(self.log),
            "messages": self.input.messages,
            "recorded": self.recorded.messages,
            "trades": self.input.trades,
            "quotes": self.input.quotes,
            "ignored": dict(sorted(self.input.ignored.items())),
            "malformed": self.input.malformed,
            "events": len(sequences),
            "first_sequence": sequences[0] if sequences else None,
            "last_sequence": sequences[-1] if sequences else None,
        }


@dataclass(frozen=True, slots=True)
class LiveReport(NumbersReport):
    """What `tickbus record` did with a live bus."""

    source: str
    log: Path
    recorded: LiveRecorded

    def _title(self) -> str:
        return f"Recorded into {self.log}"

    def _numbers(self) -> dict[str, Any]:
        sequences = self.recorded.sequences
        return {
            "source": self.source,
            "log": str(self.log),
            "records": len(sequences),
            "missed": self.recorded.missed,
            "first_sequence": sequences[0] if sequences else None,
            "last_sequence": sequences[-1] if sequences else None,
            "durable": self.recorded.durable,
            "elapsed_seconds": round(self.recorded.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class VerifyReport(NumbersReport):
    """What `tickbus log verify` found."""

    log: Path
    found: Verification | Corrupt

    @property
    def sound(self) -> bool:
        """Whether everything is what was written."""
        return isinstance(self.found, Verification)

    def _title(self) -> str:
        return f"Log {self.log}"

    def _numbers(self) -> dict[str, Any]:
        head = {"log": str(self.log), "sound": self.sound}
        if isinstance(self.found, Verification):
            return head | asdict(self.found)
        place = {name: getattr(self.found, name) for name in ("segment", "offset", "sequence")}
        return head | place

    def _details(self) -> dict[str, Any]:
        # Whoever sees the table has been told before.
        return {} if isinstance(self.found, Verification) else {"error": str(self.found)}


@dataclass(frozen=True, slots=True)
class RepairReport(NumbersReport):
    """What `tickbus log repair` can keep of a log, or has kept."""

    log: Path
    to: Path | None
    found: Salvage

    def _title(self) -> str:
        return f"Log {self.log}"

    def _numbers(self) -> dict[str, Any]:
        return {
            "log": str(self.log),
            "to": None if self.to is None else str(self.to),
            "oldest_sequence": self.found.oldest_sequence,
            "next_sequence": self.found.next_sequence,
            "kept_records": self.found.kept,
            "lost_records": sum(map(len, self.found.lost)),
        }

    def _details(self) -> dict[str, Any]:
        lost = [{"first": lost[0], "last": lost[-1]} for lost in self.found.lost]
        return {"lost": lost, "foreign_files": list(self.found.foreign)}

    def _below(self) -> Iterable[RenderableType]:
        for lost in self.found.lost:
            yield Text(f"lost: {lost[0]:,} to {lost[-1]:,}")
        for name in self.found.foreign:
            yield Text(f"of another log or of a part that was given up: {name}")


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What `tickbus log inspect` found."""

    log: Path
    segments: tuple[SegmentReport, ...]

    def as_json(self) -> str:
        """Returns the report as a JSON object."""
        segments = [segment._asdict() for segment in self.segments]
        return json.dumps({"log": str(self.log), "segments": segments}, indent=2)

    def print(self, console: Console) -> None:
        """Prints a table with a row for each file, with those columns that there is room for."""
        unlimited = console.options.update(width=_UNLIMITED)
        without: list[str] = []
        table = self._table(without)
        for name in _LEAST_WANTED_FIRST:
            if console.measure(table, options=unlimited).maximum <= console.width:
                break
            without.append(name)
            table = self._table(without)
        console.print(table)
        if without:
            names = ", ".join(without).replace("\n", " ")
            console.print(f"no room for {names}; --json gives all", style="dim", highlight=False)

    def _table(self, without: list[str]) -> Table:
        rows = [
            {name: text for name, text in _segment_row(segment).items() if name not in without}
            for segment in self.segments
        ]
        table = Table(title=Text(f"Log {self.log}", "bold"), title_justify="left")
        for name in rows[0] if rows else ():
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        return table


_UNLIMITED = 1_000
_LEAST_WANTED_FIRST = (
    "index\nbytes", "frames", "durable\nbelow", "begun", "whole\nbytes", "gaps", "objects",
    "events",
)  # fmt: skip


def _segment_row(segment: SegmentReport) -> dict[str, str]:
    """Returns what is shown of a file, by the names of the columns."""
    last = segment.next_sequence - 1
    begun = datetime.fromtimestamp(segment.created // 10**9, UTC)
    return {
        "segment": f"{segment.number}",
        "first": f"{segment.base:,}",
        "last": f"{last:,}" if last >= segment.base else "none",
        "events": f"{segment.events:,}",
        "objects": f"{segment.objects:,}",
        "gaps": f"{segment.gaps:,}",
        "durable\nbelow": f"{segment.durable:,}",
        "frames": f"{segment.frames:,}",
        "bytes": f"{segment.bytes:,}",
        "whole\nbytes": f"{segment.whole_bytes:,}",
        "index\nbytes": f"{segment.index_bytes:,}",
        "sealed": "yes" if segment.sealed else "no",
        "begun": f"{begun:%Y-%m-%d %H:%M:%S}" if segment.created else "?",
    }


@dataclass(frozen=True, slots=True)
class ExportReport(NumbersReport):
    """What `tickbus log export` did."""

    log: Path
    to: Path
    exported: Exported

    def _title(self) -> str:
        return f"Exported to {self.to}"

    def _numbers(self) -> dict[str, Any]:
        return {"log": str(self.log), "to": str(self.to)} | asdict(self.exported)


@dataclass(frozen=True, slots=True)
class LogReplayReport(NumbersReport):
    """What `tickbus replay` of a log found."""

    log: Path
    plan: ReplayPlan
    outcome: LogOutcome
    oracle: Instruments

    @property
    def totals_agree(self) -> bool:
        """Whether each subscriber's totals equal those of the independent pass."""
        return all(totals == self.oracle for totals in self.outcome.totals)

    @property
    def accounted(self) -> bool:
        """Whether each subscriber got everything, and summed what the independent pass sums."""
        return self.totals_agree and self.outcome.lost == 0

    def _title(self) -> str:
        return f"Replay of {self.log}"

    def _numbers(self) -> dict[str, Any]:
        outcome = self.outcome
        return {
            "log": str(self.log),
            "backend": outcome.backend,
            "speed": self.plan.speed,
            "subscribers": self.plan.subscribers,
            "replayed": outcome.replayed,
            "kinds": outcome.kinds,
            "missed": outcome.missed,
            "lost": outcome.lost,
            "elapsed_seconds": round(outcome.elapsed_seconds, 6),
            "events_per_second": round(outcome.replayed / outcome.elapsed_seconds, 1),
            "skipped_gaps": outcome.skipped_gaps,
            "digest": outcome.digest,
            "totals_agree": self.totals_agree,
        }

    def _details(self) -> dict[str, Any]:
        # Sums and prices are exact, in text.
        per_symbol = symbols_as_json(self.outcome.totals[0])
        return {"delivered": list(self.outcome.delivered), "per_symbol": per_symbol}

    def _below(self) -> Iterable[RenderableType]:
        if self.outcome.totals[0]:
            yield symbols_table(self.outcome.totals[0])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {kind}" for kind, count in value.items()) or "0"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"
