"""The commands `tickbus record`, `tickbus log inspect` and `tickbus log verify`."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tickbus import Event, EventStore, cli
from tickbus.captures import MarketEvent, Quote, Trade, read_capture
from tickbus.cli import app
from tickbus.cli.record import (
    ASK,
    BID,
    SIZE_UNIT,
    TRADE,
    UNKNOWN_SIZE,
    InexactError,
    compact,
)

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
    content[4_200] ^= 1
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
    assert "trades.csv:4" in capsys.readouterr().err
    assert EventStore.verify(folder).next_sequence == 0


def test_a_capture_that_cannot_be_read_exits_with_3_and_makes_no_log(
    tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "log"
    assert cli.main(["record", str(tmp_path / "missing.gz"), "--to", str(folder)]) == 3
    assert "missing.gz" in capsys.readouterr().err
    assert not folder.exists()


def test_a_log_that_another_one_writes_is_not_recorded_into(
    trades_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    with EventStore.open(tmp_path / "log"):
        assert cli.main(["record", str(trades_csv), "--to", str(tmp_path / "log")]) == 1
    assert "a log has one writer" in capsys.readouterr().err


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
    for unreadable in (tmp_path / "missing", tmp_path):
        assert cli.main(["log", "verify", str(unreadable)]) == 3
        assert cli.main(["log", "inspect", str(unreadable)]) == 3
        output = capsys.readouterr()
        assert (output.out, output.err.count("the log cannot be read")) == ("", 2)


def test_inspect_shows_each_file_whole_or_not(log: Path, capsys: Captured) -> None:
    segments = run_json(capsys, "log", "inspect", log)["segments"]
    assert [each["base"] for each in segments] == [0, 3, 6]
    assert [(each["events"], each["objects"], each["gaps"]) for each in segments] == [(1, 1, 1)] * 3
    assert all(each["sealed"] and each["bytes"] == each["whole_bytes"] for each in segments)
    assert len({each["log"] for each in segments}) == 1
    damage(log)
    first, second, _ = run_json(capsys, "log", "inspect", log)["segments"]
    assert (first["sealed"], first["next_sequence"], second) == (False, 0, segments[1])
    content = bytearray((log / first["name"]).read_bytes())
    content[100] ^= 1
    (log / first["name"]).write_bytes(content)
    assert cli.main(["log", "inspect", str(log)]) == 0
    assert "?" in capsys.readouterr().out


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
