"""The commands `tickbus record`, `tickbus log` and `tickbus replay` of a log."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tickbus import (
    ConfigError,
    Event,
    EventBatch,
    EventStore,
    Gap,
    Priority,
    Replay,
    StoreFull,
    cli,
)
from tickbus.captures import MarketEvent, Quote, Trade, read_capture
from tickbus.cli import app, export
from tickbus.cli.log_report import InspectReport
from tickbus.cli.totals import Totals
from tickbus.compact import (
    ASK,
    BID,
    SIZE_UNIT,
    TRADE,
    UNKNOWN_SIZE,
    InexactError,
    compact,
)
from tickbus.store import SegmentReport, salvage, survey

Captured = pytest.CaptureFixture[str]

CSV = (
    "timestamp,venue,symbol,price,quantity\n"
    "1700000000000,north,ABC,10.10,2\n"
    "1700000000001,south,ABC,10.30,0.00000001\n"
    "what is this\n"
)


@pytest.fixture
def trades_csv(tmp_path: Path) -> Path:
    path = tmp_path / "trades.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of three segments."""
    folder = tmp_path / "log"
    with EventStore.open(folder) as store:
        for _ in range(3):
            store.append_many([Event(1, 0), "object"])
            store.append_gap(5)
            store.seal()
    return folder


def damage(log: Path) -> str:
    """Flips a bit of the first record and returns the name of its file."""
    segment = log / f"{0:020}.elog"
    content = bytearray(segment.read_bytes())
    content[content.index(bytes(EventBatch([Event(1, 0)])))] ^= 1
    segment.write_bytes(content)
    return segment.name


def run_json(capsys: Captured, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    assert cli.main([*map(str, arguments), "--json"]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def _restored(events: list[Event]) -> list[MarketEvent]:
    """Returns the messages that became these events, without the code that is tested."""
    messages: list[MarketEvent] = []
    waiting = iter(events)
    for first in waiting:
        assert first.source is not None
        assert first.symbol is not None
        head = (first.timestamp, first.source, first.symbol)
        price, size = Decimal(repr(first.value)), first.metadata * SIZE_UNIT
        if first.event_type == TRADE:
            messages.append(Trade(*head, price, size))
            continue
        second = next(waiting)
        assert (first.event_type, second.event_type) == (BID, ASK)
        assert (second.timestamp, second.source, second.symbol) == head
        sizes = [
            None if each.metadata == UNKNOWN_SIZE else each.metadata * SIZE_UNIT
            for each in (first, second)
        ]
        messages.append(Quote(*head, price, Decimal(repr(second.value)), *sizes))
    return messages


@pytest.mark.real_data
@pytest.mark.parametrize(
    "capture",
    [
        "binance-raw/spot_btcusdt_20240808.gz",
        "binance-raw/usdm_btcusdt_20240808.gz",
    ],
)
def test_a_recorded_capture_is_read_exactly_as_it_was(
    data: Path, tmp_path: Path, capsys: Captured, capture: str
) -> None:
    folder = tmp_path / "log"
    report = run_json(capsys, "record", data / capture, "--to", folder)
    with EventStore.open(folder, read_only=True) as store:
        events = [record.event for record in store.read()]
    assert _restored(events) == list(read_capture(data / capture))
    assert report["events"] == len(events) == report["trades"] + 2 * report["quotes"]
    found = run_json(capsys, "log", "verify", folder)
    assert (found["sound"], found["next_sequence"]) == (True, len(events))


def test_recording_goes_on_behind_what_the_log_has(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    for round_ in range(2):
        report = run_json(capsys, "record", trades_csv, "--to", folder)
        assert report == {
            "source": "trades.csv",
            "log": str(folder),
            "messages": 3,
            "recorded": 2,
            "trades": 2,
            "quotes": 0,
            "ignored": {},
            "malformed": 1,
            "events": 2,
            "first_sequence": 2 * round_,
            "last_sequence": 2 * round_ + 1,
        }
    with EventStore.open(folder, read_only=True) as store:
        assert [record.topic for record in store.read()] == ["trade.ABC"] * 4
        assert [record.event.source for record in store.read(2)] == ["north", "south"]
    assert cli.main(["record", str(trades_csv), "--to", str(folder)]) == 0
    assert "last sequence" in capsys.readouterr().out


def test_strict_recording_stops_at_a_malformed_line_and_keeps_what_came_before(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    assert cli.main(["record", str(trades_csv), "--to", str(folder), "--strict"]) == 1
    told = capsys.readouterr().err
    assert "trades.csv:4" in told
    assert f"{folder} keeps the 2 events before this" in told
    assert EventStore.verify(folder).next_sequence == 2


def test_a_truncated_capture_is_recorded_up_to_where_it_ends_and_told(
    tmp_path: Path, capsys: Captured
) -> None:
    rows = [f"{1_700_000_000_000 + n},north,ABC,{n},1\n" for n in range(20_000)]
    truncated = tmp_path / "trades.csv.gz"
    content = "timestamp,venue,symbol,price,quantity\n" + "".join(rows)
    truncated.write_bytes(gzip.compress(content.encode())[:-2_000])
    folder = tmp_path / "log"
    assert cli.main(["record", str(truncated), "--to", str(folder)]) == app.UNREADABLE
    kept = EventStore.verify(folder).next_sequence
    assert 8_192 < kept < 20_000
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"tickbus: {folder} keeps the {kept:,} events before this:"
    assert "the file is damaged" in told[1]
    with EventStore.open(folder, read_only=True) as store:
        assert [record.event.value for record in store.read()] == [*range(kept)]


def test_an_interrupted_recording_says_what_it_keeps(
    trades_csv: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[MarketEvent]:
        yield from islice(read_capture(*arguments, **options), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "read_capture", interrupted)
    folder = tmp_path / "log"
    assert cli.main(["record", str(trades_csv), "--to", str(folder)]) == app.INTERRUPTED
    assert f"{folder} keeps the 1 events before this" in capsys.readouterr().err
    assert EventStore.verify(folder).next_sequence == 1


def test_a_log_without_room_ends_a_recording_with_its_error_alone(
    tmp_path: Path, trades_csv: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreFull("there is no room")

    monkeypatch.setattr(EventStore, "append_many", refuse)
    assert cli.main(["record", str(trades_csv), "--to", str(tmp_path / "log")]) == app.FAILED
    error = capsys.readouterr().err
    assert "there is no room" in error
    assert "keeps" not in error


def test_a_torn_log_that_is_recorded_into_says_what_was_cut_off(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    run_json(capsys, "record", trades_csv, "--to", folder)
    segment = folder / f"{0:020}.elog"
    segment.write_bytes(segment.read_bytes()[:-8])
    assert cli.main(["record", str(trades_csv), "--to", str(folder)]) == app.DONE
    told = capsys.readouterr().err
    assert f"tickbus: {folder} was torn: " in told
    assert "were never acknowledged, were cut off" in told
    assert cli.main(["record", str(trades_csv), "--to", str(folder)]) == app.DONE
    assert "was torn" not in capsys.readouterr().err


@pytest.mark.parametrize("source", ["market.run", "market:run()", "my-market:bus"])
def test_what_is_neither_a_capture_nor_a_bus_is_told_how_a_bus_is_named(
    tmp_path: Path, capsys: Captured, source: str
) -> None:
    assert cli.main(["record", source, "--to", str(tmp_path / "log")]) == app.UNREADABLE
    told = capsys.readouterr().err
    assert f"{source}: No such file or directory; a live bus is MODULE:ATTRIBUTE" in told
    assert not (tmp_path / "log").exists()


def test_a_capture_that_cannot_be_read_exits_with_3_and_makes_no_log(
    tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    assert cli.main(["record", str(tmp_path / "missing.gz"), "--to", str(folder)]) == 3
    assert "missing.gz" in capsys.readouterr().err
    assert not folder.exists()
    (tmp_path / "notes.txt").write_text("hello\nworld\n", encoding="utf-8")
    arguments = ["record", str(tmp_path / "notes.txt"), "--format", "csv", "--to", str(folder)]
    assert cli.main(arguments) == app.UNREADABLE
    assert "the header lacks" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("is_known", [True, False])
def test_a_log_that_another_one_writes_is_not_recorded_into(
    trades_csv: Path, tmp_path: Path, capsys: Captured, is_known: bool
) -> None:
    log = tmp_path / "a log; a log has one writer"
    with EventStore.open(log):
        if not is_known:
            (log / "LOCK").write_bytes(b"")
        assert cli.main(["record", str(trades_csv), "--to", str(log)]) == 1
    writer = f"process {os.getpid()}" if is_known else "another process"
    told = f"{log} is being written by {writer}; a log has one writer: end that process first\n"
    assert capsys.readouterr().err == f"tickbus: {told}"


def test_a_size_that_does_not_fit_exactly_is_refused(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    text = CSV.replace("0.00000001", "0.000000001")
    trades_csv.write_text(text, encoding="utf-8")
    assert cli.main(["record", str(trades_csv), "--to", str(tmp_path / "log")]) == 1
    assert "more digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("price", "size"),
    [
        (Decimal("0.1234567890123456789"), Decimal(1)),
        (Decimal(1), Decimal("1e-9")),
        (Decimal(1), Decimal("184467440737.09551615")),
        (Decimal(1), Decimal(-1)),
        (Decimal(1), Decimal("123456789012345678901234567890.1")),
    ],
)
def test_what_a_compact_event_cannot_hold_exactly_is_an_error(
    price: Decimal, size: Decimal
) -> None:
    with pytest.raises(InexactError, match="more digits"):
        list(compact(Trade(1, "north", "ABC", price, size)))


def test_a_quote_without_sizes_says_so() -> None:
    bid, ask = compact(Quote(1, "north", "EUR/USD", Decimal("1.1"), Decimal("1.2")))
    assert (bid.value, ask.value, bid.metadata, ask.metadata) == (1.1, 1.2, *[UNKNOWN_SIZE] * 2)


def test_verify_exits_with_0_sound_1_damaged_and_3_unreadable(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run_json(capsys, "log", "verify", log) == {
        "log": str(log),
        "sound": True,
        "oldest_sequence": 0,
        "next_sequence": 9,
        "segments": 3,
        "bytes": sum(path.stat().st_size for path in log.glob("*.elog")),
        "torn_bytes": 0,
        "indexes": 0,
        "wrong_indexes": 0,
    }
    assert cli.main(["log", "verify", str(log)]) == 0
    assert "sound" in capsys.readouterr().out
    segment = damage(log)
    found = run_json(capsys, "log", "verify", log, code=1)
    assert (found["sound"], found["segment"], found["sequence"]) == (False, segment, 0)
    assert cli.main(["log", "verify", str(log)]) == 1
    output = capsys.readouterr()
    assert segment in output.out
    assert "is damaged at byte" in output.err
    assert f"tickbus log repair {log}\n" in output.err
    for unreadable in (tmp_path / "missing", tmp_path):
        assert cli.main(["log", "verify", str(unreadable)]) == 3
        assert cli.main(["log", "inspect", str(unreadable)]) == 3
        output = capsys.readouterr()
        assert (output.out, output.err.count("the log cannot be read")) == ("", 2)


def test_a_file_that_is_no_log_is_told_in_one_line(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello\nworld\n", encoding="utf-8")
    for command in ("verify", "inspect", "repair"):
        assert cli.main(["log", command, str(file)]) == app.UNREADABLE
        wanted = f"{file} is no folder; give the folder of a log\n"
        assert capsys.readouterr().err == f"tickbus: the log cannot be read; {wanted}"
    assert cli.main(["record", str(trades_csv), "--to", str(file)]) == app.FAILED
    assert capsys.readouterr().err == f"tickbus: {wanted}"
    to = ["--to", str(tmp_path / "out.csv")]
    truncated = tmp_path / "trades.csv.gz"
    truncated.write_bytes(gzip.compress(CSV.encode())[:-20])
    for unreadable, why in ((file, "the format is none of"), (truncated, "the file is damaged")):
        assert cli.main(["log", "export", str(unreadable), *to]) == app.UNREADABLE
        output = capsys.readouterr()
        assert (output.out, output.err.count("\n"), why in output.err) == ("", 1, True)
    assert not [*tmp_path.glob("out*")], "nothing half written is left"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["record", "--to", "LOG"], "SOURCE"),
        (["log", "verify"], "PATH"),
        (["log", "inspect"], "PATH"),
        (["log", "repair"], "PATH"),
        (["log", "export", "--to", "a.csv"], "PATH"),
    ],
)
def test_a_missing_argument_is_named_as_the_usage_does(
    arguments: list[str], missing: str, capsys: Captured
) -> None:
    assert cli.main(arguments) == app.USAGE
    told = capsys.readouterr().err
    assert f" {missing} requires" in told
    assert "--path" not in told


def test_inspect_shows_each_file_whole_or_not(log: Path, capsys: Captured) -> None:
    segments = run_json(capsys, "log", "inspect", log)["segments"]
    assert [each["base"] for each in segments] == [0, 3, 6]
    assert [(each["events"], each["objects"], each["gaps"]) for each in segments] == [(1, 1, 1)] * 3
    assert all(each["sealed"] and each["bytes"] == each["whole_bytes"] for each in segments)
    assert len({each["log"] for each in segments}) == 1
    assert [each["index_bytes"] for each in segments] == [0] * 3
    with EventStore.open(log) as store:
        assert len(list(store.query())) == 6
    assert run_json(capsys, "log", "verify", log)["indexes"] == 3
    segments = run_json(capsys, "log", "inspect", log)["segments"]
    assert all(each["index_bytes"] > 0 for each in segments)
    damage(log)
    first, second, _ = run_json(capsys, "log", "inspect", log)["segments"]
    assert (first["sealed"], first["next_sequence"], second) == (False, 0, segments[1])
    content = bytearray((log / first["name"]).read_bytes())
    content[100] ^= 1
    (log / first["name"]).write_bytes(content)
    assert cli.main(["log", "inspect", str(log)]) == 0
    assert "?" in capsys.readouterr().out


def _printed(width: int) -> str:
    """Returns the table of two segments with large numbers."""
    segments = tuple(
        SegmentReport(
            name=f"{base:020}.elog",
            log="0" * 32,
            number=number,
            base=base,
            next_sequence=base + 2_056_789,
            durable=base,
            created=1_700_000_000 * 10**9,
            bytes=67_108_864,
            whole_bytes=67_108_000,
            sealed=True,
            frames=12_345,
            events=2_050_000,
            objects=6_000,
            gaps=789,
            index_bytes=345_678,
        )
        for number, base in enumerate((0, 1_234_567_890))
    )
    console = Console(file=io.StringIO(), width=width)
    InspectReport(Path("log"), segments).print(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_inspect_shows_something_on_any_screen() -> None:
    assert "log" in _printed(20)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_inspect_breaks_no_number_however_narrow_the_screen_is(width: int) -> None:
    shown = _printed(width)
    assert max(map(len, shown.splitlines())) <= width
    for number in ("1,234,567,890", "1,236,624,678", "67,108,864"):
        assert f" {number} " in shown
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 2, "no cell is broken into two lines"
    assert ("no room for" in shown) == (width < 200)


def test_progress_is_shown_on_a_terminal_only(
    trades_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(app.sys, "stderr", stderr)
        assert cli.main(["record", str(trades_csv), "--to", str(tmp_path / "log")]) == 0
        assert ("recording" in stderr.getvalue()) == stderr.isatty()


@pytest.mark.real_data
def test_a_recorded_capture_is_replayed_with_its_totals_and_the_same_digest(
    data: Path, tmp_path: Path, capsys: Captured
) -> None:
    capture, folder = data / "binance-raw/spot_btcusdt_20240808.gz", tmp_path / "log"
    recorded = run_json(capsys, "record", capture, "--to", folder)
    live = run_json(capsys, "replay", capture)
    replays = [
        run_json(capsys, "replay", folder, *options)
        for options in (("--speed", 0), ("--backend", "ring", "--subscribers", 1, "--speed", 1e9))
    ]
    assert {replay["digest"] for replay in replays} == {_digest_of(capture)}
    for replay in replays:
        assert (replay["replayed"], replay["lost"]) == (recorded["events"], 0)
        assert replay["totals_agree"]
        assert _numbers(replay["per_symbol"]) == _numbers(live["per_symbol"])
    assert cli.main(["replay", str(folder)]) == app.DONE
    assert "BTCUSDT" in capsys.readouterr().out


def _digest_of(capture: Path) -> str:
    replay = Replay(capture)
    assert sum(map(len, replay.read())) > 0
    return replay.digest


def _numbers(per_symbol: dict[str, dict[str, Any]]) -> dict[str, dict[str, Decimal]]:
    return {
        symbol: {name: Decimal(total) for name, total in totals.items() if total is not None}
        for symbol, totals in per_symbol.items()
    }


def test_a_log_of_anything_is_replayed_and_counted(log: Path, capsys: Captured) -> None:
    report = run_json(capsys, "replay", log)
    assert report["kinds"] == {"objects": 3, "price_update": 3}
    assert (report["replayed"], report["missed"], report["per_symbol"]) == (6, 15, {})
    assert report["delivered"] == [6] * 4
    assert cli.main(["replay", str(log)]) == app.DONE
    assert report["digest"] in capsys.readouterr().out


def test_records_that_may_not_be_durable_are_left_out_and_told(
    tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    with EventStore.open(folder, durability="none") as store:
        store.append_many([Event(1, 0)] * 3)
        assert len(list(store.read())) == 3
        for command in (["replay"], ["log", "export", "--to", str(tmp_path / "out.csv")]):
            assert cli.main([*command, str(folder)]) == app.DONE
            error = capsys.readouterr().err
            assert "3 more records, which are left out" in " ".join(error.split())
    assert cli.main(["replay", str(folder)]) == app.DONE
    assert "left out" not in capsys.readouterr().err


def test_a_subscriber_that_sums_something_else_fails_the_replay(
    log: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "tally_log", lambda path: {("a", "b"): Totals(trades=1)})
    assert cli.main(["replay", str(log)]) == app.FAILED
    assert "independent pass over the log" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["replay", "export"])
def test_a_damaged_log_fails_what_reads_it_and_what_is_none_is_unreadable(
    log: Path, tmp_path: Path, capsys: Captured, command: str
) -> None:
    def arguments(folder: Path) -> list[str]:
        to = tmp_path / "out.csv"
        if command == "replay":
            return ["replay", str(folder)]
        return ["log", "export", str(folder), "--to", str(to)]

    assert cli.main(arguments(tmp_path)) == app.UNREADABLE
    assert "holds no log" in capsys.readouterr().err
    segment = damage(log)
    assert cli.main(arguments(log)) == app.FAILED
    told = capsys.readouterr().err
    assert f"segment {segment} is damaged" in told
    assert f"tickbus log repair {log}\n" in told
    assert not [*tmp_path.glob("out*")], "nothing half written is left"


@pytest.mark.parametrize(
    "options", [["--format", "csv"], ["--compare"], ["--strict"], ["another.gz"]]
)
def test_what_means_nothing_for_a_log_is_refused(
    log: Path, capsys: Captured, options: list[str]
) -> None:
    assert cli.main(["replay", str(log), *options]) == app.USAGE
    assert "a log is replayed alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.arrow"])
def test_an_exported_table_has_every_record(
    trades_csv: Path, tmp_path: Path, capsys: Captured, name: str
) -> None:
    folder, to = tmp_path / "log", tmp_path / name
    run_json(capsys, "record", trades_csv, "--to", folder)
    with EventStore.open(folder) as store:
        store.append({"a": [1]}, topic="notes")
        store.append(Event(0, 200, Priority.High, value=-0.5, metadata=(1 << 64) - 1))
    report = run_json(capsys, "log", "export", folder, "--to", to)
    assert (report["events"], report["objects"], report["bytes"]) == (3, 1, to.stat().st_size)
    first, second = 1_700_000_000_000_000_000, 1_700_000_000_001_000_000
    rows = [
        (first, "trade", TRADE, 0, "north", "ABC", 10.1, 200_000_000, None, None),
        (second, "trade", TRADE, 0, "south", "ABC", 10.3, 1, None, None),
        (None, None, None, None, None, None, None, None, "notes", '{"a":[1]}'),
        (None, None, 200, 1, None, None, -0.5, (1 << 64) - 1, None, None),
    ]
    assert _table(to) == rows
    assert cli.main(["log", "export", str(folder), "--to", str(to)]) == app.USAGE
    assert "there already" in capsys.readouterr().err


def _table(path: Path) -> list[tuple[Any, ...]]:
    """Reads an exported table back, without the code that is tested."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        kinds = (int, str, int, int, str, str, float, int, str, str)
        found = [
            tuple(kind(cell) if cell else None for kind, cell in zip(kinds, row, strict=True))
            for row in rows
        ]
    else:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            with pa.ipc.open_file(path) as reader:
                table = reader.read_all()
        head = table.column_names
        assert str(table.schema.field("timestamp").type) == "timestamp[ns, tz=UTC]"
        times = table.column(0).cast(pa.int64())
        found = [tuple(row.values()) for row in table.set_column(0, head[0], times).to_pylist()]
    assert tuple(head) == export.COLUMNS
    return found


def test_records_of_many_frames_are_exported_as_few_row_groups(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "log"
    with EventStore.open(folder) as store:
        for number in range(100):
            store.append_many([f"object {number}", Event(number, 0)])
    whole, parts, arrow = (str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c.arrow"))
    run_json(capsys, "log", "export", folder, "--to", whole)
    run_json(capsys, "log", "export", folder, "--to", arrow)
    monkeypatch.setattr(export, "_GROUP_ROWS", 40)
    run_json(capsys, "log", "export", folder, "--to", parts)
    groups = [pq.ParquetFile(path).metadata.num_row_groups for path in (whole, parts)]
    assert groups == [1, 5]
    with pa.ipc.open_file(arrow) as file:
        assert file.num_record_batches == 1
        assert pq.read_table(whole) == pq.read_table(parts) == file.read_all()
    monkeypatch.setattr(export, "_GROUP_BYTES", 1)
    run_json(capsys, "log", "export", folder, "--to", tmp_path / "d.parquet")
    assert pq.ParquetFile(tmp_path / "d.parquet").metadata.num_row_groups == 200


def test_a_part_is_exported_by_time_type_and_symbol(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    run_json(capsys, "record", trades_csv, "--to", folder)

    def exported(name: str, *options: str) -> int:
        return run_json(capsys, "log", "export", folder, "--to", tmp_path / name, *options)[
            "events"
        ]

    assert exported("1.csv", "--start", "1700000000001000000") == 1
    assert exported("2.csv", "--stop", "2023-11-14T22:13:20.001+00:00") == 1
    assert exported("3.csv", "--start", "2023-11-14T22:13:20", "--types", "trade") == 2
    assert exported("4.csv", "--types", "bid") == 0
    assert exported("5.csv", "--symbols", "ABC", "--symbols", "XYZ") == 2
    for options in (["--start", "soon"], ["--types", "nothing"]):
        to = ["--to", str(tmp_path / "6.csv")]
        assert cli.main(["log", "export", str(folder), *to, *options]) == app.USAGE
    assert "2024-08-08T12:00:00Z" in capsys.readouterr().err
    assert cli.main(["log", "export", str(folder), "--to", "x.xlsx"]) == app.USAGE
    assert "csv, parquet, arrow" in capsys.readouterr().err


def test_an_export_that_cannot_have_what_is_asked_for_says_what_it_can_have(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    def told(to: Path, *options: str, code: int = app.USAGE) -> str:
        assert cli.main(["log", "export", str(log), "--to", str(to), *options]) == code
        return capsys.readouterr().err

    to = tmp_path / "out.csv"
    for names in ("Trade", "trade,bid"):
        assert f"--types was '{names}'; it must be one of price_update, " in told(
            to, "--types", names
        )
    assert "repeat --types" in told(to, "--types", "trade", "--types", "nothing")
    assert "--start must be before --stop" in told(to, "--start", "3", "--stop", "3")
    nowhere = tmp_path / "nowhere" / "out.csv"
    assert told(nowhere).startswith(f"tickbus: {nowhere} cannot be written: there is no folder")
    assert not to.exists()
    empty = told(to, "--symbols", "XYZ", code=app.DONE)
    assert empty == f"tickbus: {log} has no such record; {to} has no rows\n"


def test_an_export_that_cannot_be_written_names_the_file_that_was_given(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    to = tmp_path / "out.csv"
    to.with_name("out.csv.part").mkdir()
    with pytest.raises(OSError, match=r"out\.csv\.part"):
        export.export(log, to, "csv", lambda done: None)
    assert cli.main(["log", "export", str(log), "--to", str(to)]) == app.FAILED
    assert capsys.readouterr().err.startswith(f"tickbus: {to} cannot be written; ")


def test_an_export_without_pyarrow_says_what_to_install(
    log: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ["log", "export", str(log), "--to", str(tmp_path / "out.parquet")]
    assert cli.main(arguments) == app.FAILED
    assert "pip install 'tickbus[arrow]'" in capsys.readouterr().err
    assert cli.main([*arguments, "--format", "csv"]) == app.DONE


def test_repair_says_what_is_kept_and_lost_and_changes_nothing_until_it_is_told_to(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    name, new = damage(log), tmp_path / "new"
    before = {path.name: path.read_bytes() for path in log.iterdir()}
    expected = {
        "log": str(log),
        "to": None,
        "oldest_sequence": 0,
        "next_sequence": 9,
        "kept_records": 8,
        "lost_records": 1,
        "lost": [{"first": 0, "last": 0}],
        "foreign_files": [],
    }
    for arguments in ((), ("--to", new)):
        assert run_json(capsys, "log", "repair", log, *arguments, code=1) == expected
        assert not new.exists()
    report = run_json(capsys, "log", "repair", log, "--to", new, "--yes")
    assert report == expected | {"to": str(new)}
    assert {path.name: path.read_bytes() for path in log.iterdir()} == before
    assert name in before
    found = run_json(capsys, "log", "verify", new)
    assert (found["sound"], found["next_sequence"]) == (True, 9)
    with EventStore.open(new) as store:
        events = [record.event for record in store.read()]
        assert store.append("it goes on") == 9
    assert events == [Gap(1, True), "object", Gap(5, True)] + 2 * [
        Event(1, 0),
        "object",
        Gap(5, True),
    ]
    assert run_json(capsys, "log", "repair", new)["lost"] == []


def test_repair_says_that_nothing_was_written_of_a_log_that_lost_no_record(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    new, repair = tmp_path / "new", ["log", "repair", str(log)]
    assert cli.main(repair) == app.DONE
    assert capsys.readouterr().err == ""
    told = "tickbus: nothing was written; give {} to write what is whole into a new log\n"
    assert cli.main([*repair, "--to", str(new)]) == app.DONE
    assert capsys.readouterr().err == told.format("--yes")
    segment = log / f"{3:020}.elog"
    content = bytearray(segment.read_bytes())
    content[100] ^= 1
    segment.write_bytes(content)
    assert run_json(capsys, "log", "repair", log, code=app.FAILED)["lost"] == []
    assert cli.main(repair) == app.FAILED
    assert capsys.readouterr().err == told.format("--to NEW --yes")
    assert run_json(capsys, "log", "repair", log, "--to", new, "--yes")["kept_records"] == 9
    assert run_json(capsys, "log", "verify", new)["sound"]


def test_repair_mends_a_log_in_whose_version_a_bit_has_flipped(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert not survey(log).damaged
    segment = log / f"{3:020}.elog"
    content = bytearray(segment.read_bytes())
    content[8] ^= 1
    segment.write_bytes(content)
    assert survey(log).damaged
    assert cli.main(["log", "repair", str(log)]) == app.FAILED
    assert "nothing was written" in capsys.readouterr().err
    new = tmp_path / "new"
    assert run_json(capsys, "log", "repair", log, "--to", new, "--yes")["kept_records"] == 9
    assert run_json(capsys, "log", "verify", new)["sound"]


def test_repair_leaves_out_what_belongs_to_another_log_and_shows_it(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    with EventStore.open(tmp_path / "other") as store:
        store.append_many(["not ours"] * 4)
    ours, theirs = f"{3:020}.elog", f"{0:020}.elog"
    (log / ours).write_bytes((tmp_path / "other" / theirs).read_bytes())
    assert cli.main(["log", "repair", str(log)]) == 1
    shown = capsys.readouterr()
    assert "lost: 3 to 5" in shown.out
    assert f"of another log or of a part that was given up: {ours}" in shown.out
    assert "give --to NEW --yes" in shown.err


def test_repair_that_cannot_be_done_is_told_and_leaves_nothing(
    log: Path, tmp_path: Path, capsys: Captured
) -> None:
    damage(log)
    new = tmp_path / "new"
    repair = ["log", "repair", str(log)]
    assert cli.main([*repair, "--yes"]) == 2
    assert "--yes was given without --to" in capsys.readouterr().err
    new.mkdir()
    assert cli.main([*repair, "--to", str(new), "--yes"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert list(new.iterdir()) == []
    assert cli.main([*repair, "--to", f"{log}/LOCK/new", "--yes"]) == 1
    assert "failed" in capsys.readouterr().err
    assert cli.main(["log", "repair", str(new)]) == 3
    assert "holds no log" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="it must have a name"):
        salvage(log, "/")
    with EventStore.open(tmp_path / "live"):
        assert cli.main(["log", "repair", str(tmp_path / "live")]) == 1
    assert "is being written by process" in capsys.readouterr().err
