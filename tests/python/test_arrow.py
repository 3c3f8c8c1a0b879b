"""Batches of compact events as columns: what each reader of Arrow makes of them."""

from __future__ import annotations

import sys
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from growth import MEASURE, MOST_BYTES
from support import run_child
from tickbus import Event, EventBatch, EventType

NOON = 1_767_268_800_000_000_123
EventType.register("auction_opened", 12)
BATCH = EventBatch(
    [
        Event(NOON, EventType.PriceUpdate, 0, "binance", "BTCUSDT", 61_000.5, 2**64 - 1),
        Event(NOON + 1, "auction_opened", 1, "kraken", "ETHUSDT", -1.5, 0),
        Event(0, EventType.EmergencyStop, 2, None, None, float("inf"), 1),
        Event(NOON + 2, 250, 3, "binance", "BTCUSDT", 1e-300, 2),
        Event(NOON + 3, EventType.PriceUpdate, 0, (1 << 16) - 1, (1 << 32) - 1, 0.0, 3),
    ]
)
COLUMNS: dict[str, list[Any]] = {
    "timestamp": [NOON, NOON + 1, None, NOON + 2, NOON + 3],
    "event_type": ["price_update", "auction_opened", "emergency_stop", None, "price_update"],
    "event_type_code": [0, 12, 128, 250, 0],
    "priority": [0, 1, 2, 3, 0],
    "source": ["binance", "kraken", None, "binance", None],
    "symbol": ["BTCUSDT", "ETHUSDT", None, "BTCUSDT", None],
    "value": [61_000.5, -1.5, float("inf"), 1e-300, 0.0],
    "metadata": [2**64 - 1, 0, 1, 2, 3],
}
EMPTY = EventBatch([])
NAMELESS = EventBatch([Event(1, 251)] * 3)


def _nanoseconds(times: list[Any]) -> list[int | None]:
    return [None if time is None else time.value for time in times]


def test_pyarrow_reads_every_column() -> None:
    batch = pa.record_batch(BATCH)
    batch.validate(full=True)
    assert batch.schema == pa.schema(BATCH)
    assert batch.schema.names == list(COLUMNS)
    assert batch.schema.field("timestamp").type == pa.timestamp("ns", "UTC")
    for name in ("event_type", "source", "symbol"):
        assert batch.schema.field(name).type == pa.dictionary(pa.int32(), pa.string())
    columns = batch.to_pydict()
    columns["timestamp"] = _nanoseconds(columns["timestamp"])
    assert columns == COLUMNS
    assert batch.column("symbol").dictionary.to_pylist() == ["BTCUSDT", "ETHUSDT"]
    assert pa.table(BATCH).num_rows == len(BATCH)


def test_polars_reads_every_column() -> None:
    frame = pl.DataFrame(BATCH)
    assert frame.schema["timestamp"] == pl.Datetime("ns", "UTC")
    assert frame.schema["symbol"] == pl.Categorical
    columns = frame.with_columns(pl.col("timestamp").to_physical()).to_dict(as_series=False)
    assert columns == COLUMNS


def test_pandas_reads_every_column() -> None:
    frame = pd.DataFrame.from_arrow(BATCH)
    assert str(frame.dtypes["timestamp"]) == "datetime64[ns, UTC]"
    assert isinstance(frame.dtypes["symbol"], pd.CategoricalDtype)
    columns = {name: frame[name].astype(object) for name in frame}
    found = {name: column.where(column.notna(), None).tolist() for name, column in columns.items()}
    found["timestamp"] = _nanoseconds(found["timestamp"])
    assert found == COLUMNS


def test_duckdb_reads_every_column() -> None:
    batch = BATCH
    rows = duckdb.sql("SELECT epoch_ns(timestamp), * EXCLUDE timestamp FROM batch").fetchall()
    assert [*map(list, zip(*rows, strict=True))] == list(COLUMNS.values())
    kinds = duckdb.sql("SELECT DISTINCT typeof(timestamp) FROM batch").fetchall()
    assert kinds == [("TIMESTAMPTZ_NS",)]
    query = "SELECT symbol, sum(metadata) FROM batch GROUP BY symbol ORDER BY symbol NULLS LAST"
    sums = duckdb.sql(query).fetchall()
    assert sums == [("BTCUSDT", 2**64 + 1), ("ETHUSDT", 0), (None, 4)]
    assert batch is BATCH


@pytest.mark.parametrize("batch", [EMPTY, NAMELESS], ids=["empty", "nameless"])
def test_batches_without_events_or_names_are_read(batch: EventBatch) -> None:
    nothing = [None] * len(batch)
    read = pa.record_batch(batch)
    read.validate(full=True)
    assert read.column("symbol").to_pylist() == nothing
    assert pl.DataFrame(batch)["event_type"].to_list() == nothing
    assert pd.DataFrame.from_arrow(batch)["source"].isna().tolist() == [True] * len(batch)
    assert duckdb.sql("SELECT symbol FROM batch").fetchall() == [(None,)] * len(batch)


def test_bitmaps_and_indices_are_right_for_many_rows() -> None:
    symbols = [f"S{number}" for number in range(300)]
    events = [
        Event(number % 3, 0, symbol=symbols[number % 300] if number % 7 else None, metadata=number)
        for number in range(10_007)
    ]
    read = pa.record_batch(EventBatch(events))
    read.validate(full=True)
    assert read.column("symbol").to_pylist() == [event.symbol for event in events]
    assert read.column("timestamp").null_count == len([e for e in events if not e.timestamp])
    assert read.column("timestamp").is_null().to_pylist() == [not e.timestamp for e in events]
    assert read.column("metadata").to_pylist() == [*range(10_007)]


def test_columns_outlive_the_batch_and_each_other() -> None:
    value = pa.record_batch(EventBatch([*BATCH])).column("value")
    assert value.to_pylist() == COLUMNS["value"]


def test_a_timestamp_that_columns_cannot_hold_is_refused() -> None:
    late = EventBatch([Event(1, 0), Event(2**63, 0)])
    with pytest.raises(OverflowError, match="event 1 has the timestamp 9223372036854775808"):
        pa.record_batch(late)
    assert pa.record_batch(EventBatch([Event(2**63 - 1, 0)])).num_rows == 1


def test_capsules_that_nobody_takes_are_let_go() -> None:
    schema, array = BATCH.__arrow_c_array__(BATCH.__arrow_c_schema__())
    assert 'object "arrow_schema"' in repr(schema)
    assert 'object "arrow_array"' in repr(array)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
@pytest.mark.parametrize(
    "use",
    ["batch.__arrow_c_array__()", "pyarrow.record_batch(batch)", "memoryview(batch).tobytes()"],
)
def test_handing_out_columns_leaks_nothing(use: str) -> None:
    script = f"""{MEASURE}
import pyarrow
batch = tickbus.EventBatch([tickbus.Event(n, 0, symbol=f"S{{n % 50}}") for n in range(10_000)])
def run(times):
    for _ in range(times):
        {use}
run(100)
gc.collect()
before = resident_bytes()
run(400)
gc.collect()
print(resident_bytes() - before)
"""
    child = run_child(script, 60.0)
    assert (child.returncode, child.stderr) == (0, "")
    # One array of 10,000 events has 460,000 bytes.
    assert int(child.stdout) < MOST_BYTES
