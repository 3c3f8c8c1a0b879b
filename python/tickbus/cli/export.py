"""Exports: what a log has, as a table in a file of CSV, Parquet or Arrow.

Events and objects have a `timestamp` in ns since the Unix epoch, UTC, or nothing where it is
unknown: a number in CSV, a timestamp in the other two. Events have their fields too, with the names
of type, source and symbol; objects have their `topic`, and as `object` their JSON.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tickbus import ConfigError, EventBatch, Record, Replay

__all__ = ["COLUMNS", "FORMATS", "Exported", "export", "format_of"]

COLUMNS = (
    "timestamp",
    "event_type",
    "event_type_code",
    "priority",
    "source",
    "symbol",
    "value",
    "metadata",
    "topic",
    "object",
)
"""The columns, in their order."""
FORMATS = ("csv", "parquet", "arrow")
"""Names of the formats, which are the usual endings of such files."""

_ENDINGS = {**{f".{name}": name for name in FORMATS}, ".feather": "arrow", ".pq": "parquet"}

# A row group of Parquet, or a batch of Arrow, is written once it has one of them.
_GROUP_ROWS = 1 << 17
_GROUP_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Exported:
    """What was exported.

    Attributes:
        format: One of `FORMATS`.
        events: Compact events.
        objects: Objects.
        missed: Events that the log says were lost on the way into it, or were removed since; they
            are known only where all of it is exported.
        bytes: Bytes of the file.
        digest: That of a replay of the same.
    """

    format: str
    events: int
    objects: int
    missed: int
    bytes: int
    digest: str


def format_of(path: Path, name: str | None) -> str:
    """Returns the format of a file: the one that is named, or that of its ending.

    Raises:
        ConfigError: It is none of `FORMATS`.
    """
    found = _ENDINGS.get(path.suffix.lower()) if name is None else name
    if found in FORMATS:
        return found
    raise ConfigError(
        f"the format was {name or path.suffix!r}; it must be one of {', '.join(FORMATS)}: name it "
        "with --format, or by the ending of the file"
    )


def export(
    log: Path, to: Path, format: str, on_progress: Callable[[int], None], **wanted: Any
) -> Exported:
    """Writes what is wanted of a log into a file, which is there only when it is whole.

    Args:
        log: The folder of the log.
        to: The file, made anew.
        format: One of `FORMATS`.
        on_progress: Called with the number of records so far.
        wanted: As for `Replay.read`.

    Raises:
        ConfigError: The file is there already, its folder is not there, or what is wanted is out
            of range.
        ModuleNotFoundError: Parquet and Arrow need pyarrow.
        StoreError: The log cannot be read.
        OSError: The file cannot be written.
    """
    if to.exists():
        raise ConfigError(f"{to} is there already; name another file, or remove it")
    if not to.parent.is_dir():
        raise ConfigError(f"{to} cannot be written: there is no folder {to.parent}; make it first")
    replay = Replay(log)
    unfinished = to.with_name(f"{to.name}.part")
    events = objects = 0
    open_writer = _csv if format == "csv" else _arrow
    try:
        with open_writer(unfinished, format) as writer:
            for records in replay.read(**wanted):
                if isinstance(records, EventBatch):
                    writer.events(records)
                    events += len(records)
                else:
                    writer.objects(records)
                    objects += len(records)
                on_progress(events + objects)
        size = unfinished.stat().st_size
        unfinished.rename(to)
    finally:
        unfinished.unlink(missing_ok=True)
    return Exported(format, events, objects, replay.progress.missed, size, replay.digest)


class _Writer(Protocol):
    """What takes the records of a table."""

    def events(self, events: EventBatch) -> None: ...
    def objects(self, records: list[Record]) -> None: ...


@contextmanager
def _csv(path: Path, format: str) -> Iterator[_Writer]:
    del format
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        yield _CsvWriter(rows.writerows)


class _CsvWriter:
    def __init__(self, write: Callable[[Iterable[Iterable[object]]], None]) -> None:
        self._write = write

    def events(self, events: EventBatch) -> None:
        self._write(
            (
                event.timestamp or None,
                event.event_type.name,
                int(event.event_type),
                int(event.priority),
                event.source,
                event.symbol,
                repr(event.value),
                event.metadata,
                None,
                None,
            )
            for event in events
        )

    def objects(self, records: list[Record]) -> None:
        nothing = (None,) * 7
        self._write(
            (record.timestamp or None, *nothing, record.topic, _json(record.event))
            for record in records
        )


@contextmanager
def _arrow(path: Path, format: str) -> Iterator[_Writer]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "Parquet and Arrow need pyarrow; install it with: pip install 'tickbus[arrow]', or "
            "export CSV",
            name=missing.name,
        ) from missing
    text, integer = pa.string(), pa.uint64()
    types = (
        pa.timestamp("ns", "UTC"), text, pa.uint8(), pa.uint8(), text, text, pa.float64(), integer,
        text, text,
    )  # fmt: skip
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    with (
        pq.ParquetWriter(path, schema) if format == "parquet" else pa.ipc.new_file(path, schema)
    ) as file:
        writer = _ArrowWriter(pa, schema, file.write_table)
        yield writer
        writer.flush()


class _ArrowWriter:
    """Gathers tables, so that a row group has many rows however few stand together in the log."""

    def __init__(self, pa: Any, schema: Any, write: Callable[[Any], None]) -> None:
        self._pa = pa
        self._schema = schema
        self._write = write
        self._tables: list[Any] = []
        self._rows = 0
        self._bytes = 0

    def flush(self) -> None:
        if self._tables:
            self._write(self._pa.concat_tables(self._tables).combine_chunks())
        self._tables, self._rows, self._bytes = [], 0, 0

    def _add(self, table: Any) -> None:
        self._tables.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self.flush()

    def events(self, events: EventBatch) -> None:
        table = self._pa.table(events)
        nothing = self._pa.nulls(len(events), self._pa.string())
        columns = [*(table.column(name) for name in COLUMNS[:8]), nothing, nothing]
        self._add(self._pa.table(columns, list(COLUMNS)).cast(self._schema))

    def objects(self, records: list[Record]) -> None:
        rows = [
            {
                "timestamp": record.timestamp or None,
                "topic": record.topic,
                "object": _json(record.event),
            }
            for record in records
        ]
        self._add(self._pa.Table.from_pylist(rows, self._schema))


def _json(event: object) -> str:
    # What is an object in a log was written with msgspec.
    import msgspec

    return msgspec.json.encode(event).decode()
