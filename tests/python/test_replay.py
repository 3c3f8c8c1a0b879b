"""The command `tickbus replay`: what it accounts for, prints, checks and returns."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from array import array
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tickbus
from tickbus import cli
from tickbus.captures import CaptureReport, MarketEvent, Trade
from tickbus.cli import app, oracle
from tickbus.cli import replay as replaying
from tickbus.cli.replay import ReplayOutcome, ReplayPlan, replay
from tickbus.cli.report import ReplayReport, percentiles
from tickbus.cli.totals import Totals

CSV = (
    "timestamp,venue,symbol,price,quantity\n"
    "1700000000000,north,ABC,10.10,2\n"
    "1700000000002,south,ABC,10.30,1\n"
    "1700000000001,north,ABC,10.20,0.000000000000000001\n"
)

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def trades_csv(tmp_path: Path) -> Path:
    path = tmp_path / "trades.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


def replay_json(capsys: Captured, *arguments: str | Path) -> dict[str, Any]:
    assert cli.main(["replay", "--json", *map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    report: dict[str, Any] = json.loads(output.out)
    return report


def test_a_synthetic_market_reaches_every_subscriber_without_loss(
    capsys: Captured, backend: str
) -> None:
    report = replay_json(
        capsys, "--events", "3000", "--subscribers", "3", "--backend", backend, "--seed", "9"
    )
    assert report["backend"] == backend
    assert report["messages"] == report["published"] == 3_000
    assert report["delivered"] == [3_000] * 3
    assert report["lost"] == report["malformed"] == 0
    assert report["totals_agree"]
    assert len(report["per_symbol"]) == 6
    assert report["events_per_second"] > 0
    latency = report["latency_ns"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["p99.9"]


def test_a_small_capacity_loses_nothing(capsys: Captured, backend: str) -> None:
    report = replay_json(capsys, "--events", "2000", "--capacity", "4", "--backend", backend)
    assert report["delivered"] == [2_000] * 4
    assert report["lost"] == 0


def test_totals_are_exact_to_the_last_digit(capsys: Captured, trades_csv: Path) -> None:
    report = replay_json(capsys, trades_csv)
    north = report["per_symbol"]["north.ABC"]
    assert north["trades"] == 2
    assert north["volume"] == "2.000000000000000001"
    assert report["per_symbol"]["south.ABC"]["vwap"] == "10.30"


def test_several_files_are_merged_by_time_and_summed_together(
    capsys: Captured, trades_csv: Path
) -> None:
    report = replay_json(capsys, trades_csv, trades_csv)
    assert report["messages"] == 6
    assert report["per_symbol"]["north.ABC"]["trades"] == 4


def test_the_same_seed_gives_the_same_totals(capsys: Captured) -> None:
    first, second = (replay_json(capsys, "--events", "500", "--seed", "4") for _ in range(2))
    assert first["per_symbol"] == second["per_symbol"]


def test_the_table_shows_the_numbers_and_that_the_totals_agree(capsys: Captured) -> None:
    assert cli.main(["replay", "--events", "1000", "--subscribers", "2"]) == 0
    output = capsys.readouterr()
    for text in ("messages", "1,000", "lost", "events/s", "p99.9", "VWAP", "sim_west"):
        assert text in output.out
    assert output.out.count("equal the independent pass") == 2
    assert "\x1b" not in output.out


def test_compare_replays_the_same_events_over_every_backend(capsys: Captured) -> None:
    report = replay_json(capsys, "--compare", "--backend", "ring", "--events", "500")
    assert list(report["backends"]) == ["ring", "lock_free", "broadcast"]
    assert all(row["totals_agree"] and row["lost"] == 0 for row in report["backends"].values())
    assert cli.main(["replay", "--compare", "--events", "500"]) == 0
    table = capsys.readouterr().out
    assert all(f"│ {name} " in table for name in report["backends"])
    assert list(replay_json(capsys, "--events", "500")["backends"]) == ["lock_free"]


def test_a_difference_on_another_backend_fails_and_names_it() -> None:
    wanted = {("north", "ABC"): Totals()}
    good = ReplayOutcome("lock_free", 0, 0, 0.0, 0, (0,), 0, (wanted,), (array("q"),))
    bad = dataclasses.replace(good, backend="ring", totals=({},))
    plan = ReplayPlan(backend="lock_free", subscribers=1)
    report = ReplayReport("nothing", plan, CaptureReport(), good, wanted, (bad,))
    assert [line.split(":")[0] for line in report.differences()] == [
        "ring, subscriber 1, north.ABC"
    ]
    output = io.StringIO()
    report.print(Console(file=output, width=200))
    assert output.getvalue().count("DIFFER from the independent pass") == 1


def test_a_malformed_line_is_reported_with_file_and_line_and_counted(
    capsys: Captured, trades_csv: Path
) -> None:
    trades_csv.write_text(CSV + "1700000000003,north,ABC,free,1\n", encoding="utf-8")
    assert cli.main(["replay", "--json", str(trades_csv)]) == 0
    output = capsys.readouterr()
    assert f"{trades_csv}:5: wanted a price" in output.err
    report = json.loads(output.out)
    assert (report["messages"], report["published"], report["malformed"]) == (4, 3, 1)


def test_strict_stops_at_the_first_malformed_line(capsys: Captured, trades_csv: Path) -> None:
    bad = "1700000000003,north,ABC,free,1\n"
    trades_csv.write_text(CSV + bad + bad, encoding="utf-8")
    assert cli.main(["replay", "--strict", str(trades_csv)]) == 1
    output = capsys.readouterr()
    assert f"{trades_csv}:5:" in output.err
    assert f"{trades_csv}:6:" not in output.err
    assert output.out == ""


def test_totals_that_differ_from_the_independent_pass_fail(
    capsys: Captured, trades_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_trade_too_many(path: Path, format: str) -> dict[tuple[str, str], Totals]:
        totals = oracle.tally_capture(path, format)
        totals["north", "ABC"].trades += 1
        return totals

    monkeypatch.setattr(app, "tally_capture", one_trade_too_many)
    assert cli.main(["replay", "--subscribers", "1", str(trades_csv)]) == 1
    output = capsys.readouterr()
    assert "DIFFER from the independent pass" in output.out
    assert "subscriber 1, north.ABC" in output.err


def test_a_publish_that_reached_fewer_subscribers_of_any_backend_fails(
    capsys: Captured, trades_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fall_short(*arguments: Any) -> ReplayOutcome:
        outcome = await replay(*arguments)
        return dataclasses.replace(outcome, shortfalls=int(outcome.backend == "ring"))

    monkeypatch.setattr(app, "replay", fall_short)
    for more in (["--backend", "ring"], ["--compare"]):
        assert cli.main(["replay", "--json", str(trades_csv), *more]) == 1
        assert "1 publishes reached fewer subscribers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speed", "fast"],
        ["--speed", "-1"],
        ["--speed", "nan"],
        ["--max-gap", "inf"],
        ["--subscribers", "0"],
        ["--capacity", "0"],
        ["--events", "0"],
        ["--backend", "carrier_pigeon"],
        ["--format", "parquet"],
        ["--no-such-option"],
    ],
)
def test_wrong_usage_returns_2_and_says_why(capsys: Captured, arguments: list[str]) -> None:
    assert cli.main(["replay", "--json", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err != ""


def test_an_unknown_command_returns_2() -> None:
    assert cli.main(["rewind"]) == 2


def test_input_that_cannot_be_read_returns_3_and_is_named(capsys: Captured, tmp_path: Path) -> None:
    unknown, headless = tmp_path / "unknown", tmp_path / "headless.csv"
    unknown.write_text("what is this\n", encoding="utf-8")
    headless.write_text("price,size\n1,1\n", encoding="utf-8")
    for path in (tmp_path / "absent.gz", unknown, headless, tmp_path):
        assert cli.main(["replay", str(path)]) == 3
        assert str(path) in capsys.readouterr().err


def test_whoever_has_an_unknown_capture_is_told_of_the_option(
    capsys: Captured, tmp_path: Path
) -> None:
    unknown = tmp_path / "unknown"
    unknown.write_text("what is this\n", encoding="utf-8")
    for command in (["replay"], ["record", "--to", str(tmp_path / "log")]):
        assert cli.main([*command, str(unknown)]) == 3
        assert "name it with --format if" in capsys.readouterr().err


def test_help_shows_an_example(capsys: Captured) -> None:
    assert cli.main(["replay", "--help"]) == 0
    assert "Example: tickbus replay" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("library", ["cyclopts", "rich"])
def test_a_missing_library_is_named_with_what_installs_it(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    for name in [*sys.modules]:
        if name.startswith(("tickbus.cli.", f"{library}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cli, "app")
    monkeypatch.setitem(sys.modules, library, None)
    assert cli.main(["replay"]) == 1
    error = capsys.readouterr().err
    assert library in error
    assert "pip install 'tickbus[cli]'" in error


def test_a_module_that_is_missing_by_mistake_is_no_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "tickbus.cli.app")
    monkeypatch.delattr(cli, "app")
    monkeypatch.setitem(sys.modules, "tickbus.captures", None)
    with pytest.raises(ModuleNotFoundError, match=r"tickbus\.captures"):
        cli.main(["replay"])


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tickbus", "replay", "--events", "100", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout)["published"] == 100
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", "--events", "100", "--json"],
        ["replay", "--events", "100"],
        ["log", "inspect", "--json", "LOG"],
        ["log", "inspect", "LOG"],
        ["--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_a_command_whose_output_nobody_reads_ends_quietly(
    folder: Path, arguments: list[str]
) -> None:
    tickbus.EventStore.open(folder).close()
    named = [str(folder) if argument == "LOG" else argument for argument in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "tickbus", *named],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize("arguments", [["--speed", "0.001"], ["--events", "100000"]])
def test_ctrl_c_ends_the_program_cleanly(arguments: list[str]) -> None:
    # The replay is interrupted from inside as soon as its producer is at work.
    program = """
import os, signal, sys, threading
from tickbus.cli import main
from tickbus.cli import replay
tick = replay.tick
async def interrupting(count, on_progress):
    os.kill(os.getpid(), signal.SIGINT)
    await tick(count, on_progress)
replay.tick = interrupting
code = main(["replay", *sys.argv[1:]])
assert threading.active_count() == 1, threading.enumerate()
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == "tickbus: interrupted; everything is closed\n"
    assert done.returncode == 130


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("no_color", [False, True])
def test_the_progress_bar_appears_on_a_terminal_and_obeys_no_color(no_color: bool) -> None:
    controller, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    if no_color:
        environment["NO_COLOR"] = "1"
    command = [sys.executable, "-m", "tickbus", "replay", "--events", "500", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True
    )
    os.close(terminal)
    shown = bytearray()
    drain = threading.Thread(target=_drain, args=(controller, shown))
    drain.start()
    output, _ = process.communicate(timeout=60)
    drain.join()
    os.close(controller)
    assert process.returncode == 0
    assert json.loads(output)["published"] == 500
    assert b"replaying" in shown
    assert (b"\x1b[32m" in shown) is not no_color


def _drain(controller: int, shown: bytearray) -> None:
    try:
        while chunk := os.read(controller, 4096):
            shown += chunk
    except OSError:
        return  # Linux reports the end of a pseudo-terminal as an error.


def trades_at(*seconds: float) -> list[MarketEvent]:
    return [Trade(int(second * 1e9), "venue", "X", Decimal(1), Decimal(1)) for second in seconds]


def test_a_paced_replay_takes_at_least_the_recorded_time() -> None:
    plan = ReplayPlan(subscribers=1, speed=10)
    outcome = asyncio.run(replay(trades_at(0, 0.5, 1.0), plan))
    assert outcome.elapsed_seconds >= 0.1
    assert outcome.skipped_gaps == 0


def test_gaps_longer_than_the_longest_are_counted_and_not_waited_for() -> None:
    plan = ReplayPlan(subscribers=1, speed=1, longest_gap=10)
    outcome = asyncio.run(replay(trades_at(0, 1_000_000, 2_000_000, 1_000_000), plan))
    assert outcome.skipped_gaps == 2
    assert outcome.delivered == (4,)


def test_the_table_shows_the_gaps_that_were_not_waited_for(
    capsys: Captured, trades_csv: Path
) -> None:
    text = CSV + "1800000000000,north,ABC,10.40,1\n"
    trades_csv.write_text(text, encoding="utf-8")
    assert cli.main(["replay", "--speed", "10", "--max-gap", "60", str(trades_csv)]) == 0
    output = capsys.readouterr().out
    (gaps,) = [line for line in output.splitlines() if "gaps not waited for" in line]
    assert re.findall(r"\d+", gaps) == ["1"]
    assert "10x" in output
    assert "flat out" not in output


def test_an_event_that_cannot_be_published_fails_the_replay() -> None:
    nameless = Trade(1, "", "X", Decimal(1), Decimal(1))
    with pytest.raises(tickbus.ConfigError, match="topic"):
        asyncio.run(replay([*trades_at(0), nameless], ReplayPlan(subscribers=2)))
    assert not any("replay" in thread.name for thread in threading.enumerate())


def test_a_subscriber_that_leaves_shows_in_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stay = replaying.receive

    async def receive(subscription: Any, add: Any) -> None:
        if subscription.id == 0:
            subscription.close()
        else:
            await stay(subscription, add)

    monkeypatch.setattr(replaying, "receive", receive)
    # The second event waits for room until the first subscriber has left.
    plan = ReplayPlan(backend="lock_free", subscribers=2, capacity=1)
    outcome = asyncio.run(replay(trades_at(1, 2, 3), plan))
    assert outcome.shortfalls >= 2
    assert (outcome.published, outcome.delivered, outcome.lost) == (3, (0, 3), 3)


def test_a_hole_shows_as_lost_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_small_bus(plan: ReplayPlan, events: int) -> tickbus.EventBus[Any]:
        return tickbus.EventBus("broadcast", plan.capacity)

    monkeypatch.setattr(replaying, "_open_bus", open_small_bus)
    # Everything is published before the subscribers read.
    monkeypatch.setattr(replaying._Producer, "start", replaying._Producer.run)
    monkeypatch.setattr(replaying._Producer, "join", lambda producer: None)
    outcome = asyncio.run(replay(trades_at(*range(10)), ReplayPlan(subscribers=2, capacity=4)))
    assert (outcome.published, outcome.delivered, outcome.lost) == (10, (4, 4), 12)


def test_no_events_at_all_are_a_replay_of_nothing() -> None:
    outcome = asyncio.run(replay([], ReplayPlan(subscribers=2)))
    assert outcome.delivered == (0, 0)
    assert outcome.events_per_second == 0.0
    assert percentiles(outcome.latencies_ns) == {"p50": None, "p99": None, "p99.9": None}


def test_percentiles_are_nearest_ranks_over_all_subscribers() -> None:
    latencies = (array("q", range(1, 501)), array("q", range(501, 1_001)))
    assert percentiles(latencies) == {"p50": 500, "p99": 990, "p99.9": 999}


@pytest.mark.parametrize(
    ("latencies", "shown"),
    [
        ([], ("-", "-", "-")),
        ([900] * 98 + [1_500] * 2, ("900 ns", "1.5 us", "1.5 us")),
        ([900] * 98 + [1_500_000, 2_000_000_000], ("900 ns", "1.5 ms", "2.0 s")),
    ],
)
def test_latencies_are_shown_in_a_unit_that_fits(
    latencies: list[int], shown: tuple[str, ...]
) -> None:
    outcome = ReplayOutcome("lock_free", 0, 0, 0.0, 0, (0,), 0, ({},), (array("q", latencies),))
    report = ReplayReport("a test", ReplayPlan(subscribers=1), CaptureReport(), outcome, {})
    output = io.StringIO()
    report.print(Console(file=output, width=120))
    found = re.findall(r"latency p\S+\s*\S\s*([\d.]+ \w+|-)", output.getvalue())
    assert tuple(found) == shown


BINANCE_LINES = [
    '1 {"stream":"x@trade","data":{"e":"trade","s":"X","p":"1.5","q":"2","M":true}}',
    '2 {"stream": "x@trade", "data": {"s": "X", "p": "-1e-3", "q": "2.", "X": "MARKET"}}',
    '3 {"stream":"x@bookTicker","data":{"s":"X","b":"1","B":"1","a":"2","A":"1"}}',
    '4 {"stream":"!bookTicker","data":{"e":"bookTicker","s":"X","b":"1","B":"1","a":"2","A":"1"}}',
    '5 {"stream":"x@aggTrade","data":{"s":"X","p":"1","q":"1"}}',
    '6 {"stream":"x@trade","data":{"s":"X","p":"NaN","q":"1"}}',
    '7 {"stream":"x@trade","data":{"s":"X","p":"1","q":"-1"}}',
    '8 {"stream":"x@trade","data":{"s":"X","p":"1e18","q":"1"}}',
    '9 {"stream":"x@trade","data":{"s":"X","p":"0.0000000000000000001","q":"1"}}',
    '10 {"stream":"x@bookTicker","data":{"s":"X","b":"1","B":"-1","a":"2","A":"1"}}',
    '11 {"stream":"x@trade","data":{"s":"X","p":1,"q":"1"}}',
    '12 {"stream":"x@trade","data":{"s":"","p":"1","q":"1"}}',
    '13 {"stream":"x@trade","data":{"s":"X","p":"1","q":"1"}',
    'x {"stream":"x@trade","data":{"s":"X","p":"1","q":"1"}}',
    '15 {"stream":"x@bookTicker","data":{"s":"X","b":"?","B":"1","a":"2","A":"1"}}',
]
CSV_LINES = [
    "time,symbol,price,size,exchange",
    "1,X,1.5,2,north",
    '1.25,"X","1.5","2","north"',
    "2024-01-01T00:00:00Z,Y,.5,1e2,south",
    "2024-13-01,X,1,1,north",
    "soon,X,1,1,north",
    "1,X,1,-1,north",
    "1,X,1_0,1,north",
    "1,X,inf,1,north",
    "1,,1,1,north",
    "1,X,1,1",
    '1,"X,1,1,north',
]


@pytest.mark.parametrize(
    ("lines", "published", "ignored", "malformed"),
    [(BINANCE_LINES, 4, 1, 10), (CSV_LINES, 3, 0, 8)],
    ids=["binance", "csv"],
)
def test_the_independent_pass_and_the_reader_agree_on_good_and_bad_lines(
    capsys: Captured,
    tmp_path: Path,
    lines: list[str],
    published: int,
    ignored: int,
    malformed: int,
) -> None:
    path = tmp_path / "capture"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert cli.main(["replay", "--json", "--subscribers", "1", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["published"], sum(report["ignored"].values()), report["malformed"]
    assert found == (published, ignored, malformed)


@pytest.mark.parametrize(
    ("member", "lines", "published", "ignored", "malformed"),
    [
        (
            "20140508_eurusd_tick_quote.csv",
            ["1,1.3,1.4", "2,1.3", "x,1.3,1.4", "86400000,1.3,1.4", "3,1.3,x", "4,1.2,1.3"],
            2,
            0,
            4,
        ),
        (
            "20131008_spy_Trade_Tick.csv",
            ["1,10,1,Q,0,0", "2,10,1,Q,0", "3,10,1,Q,0,1", "4,1.0,1,Q,0,0", "5,10,1,?,0,0"],
            1,
            1,
            3,
        ),
    ],
    ids=["forex", "equity"],
)
def test_the_independent_pass_and_the_reader_agree_on_lean_zips(
    capsys: Captured,
    tmp_path: Path,
    member: str,
    lines: list[str],
    published: int,
    ignored: int,
    malformed: int,
) -> None:
    path = tmp_path / "capture.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "\n".join(lines))
    assert cli.main(["replay", "--json", "--subscribers", "1", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["published"], sum(report["ignored"].values()), report["malformed"]
    assert found == (published, ignored, malformed)
    assert report["totals_agree"]


def test_the_independent_pass_finds_nothing_without_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "trades.csv"
    path.write_text("time,price,size\n1,1,1\n", encoding="utf-8")
    assert oracle.tally_capture(path, "csv") == {}


def test_the_independent_pass_shares_no_parsing_code_with_the_reader() -> None:
    source = Path(oracle.__file__).read_text(encoding="utf-8")
    for name in ("captures import", "import json", "import csv"):
        assert name not in source


@pytest.mark.real_data
def test_the_real_spot_capture_publishes_exactly_its_trades_and_quotes(
    capsys: Captured, data: Path, backend: str
) -> None:
    path = data / "binance-raw" / "spot_btcusdt_20240808.gz"
    report = replay_json(capsys, path, "--backend", backend, "--subscribers", "2")
    assert report["messages"] == 41_249
    assert report["published"] == 9_757 + 28_040
    assert report["ignored"] == {"depth": 3_451, "snapshot": 1}
    assert report["malformed"] == report["lost"] == 0
    assert report["delivered"] == [37_797] * 2
    spot = report["per_symbol"]["binance_spot.BTCUSDT"]
    assert (spot["trades"], spot["quotes"]) == (9_757, 28_040)
    assert Decimal(spot["volume"]) == Decimal("212.03315")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("file", "published"),
    [
        ("lean-eurusd/fxcm_eurusd_20140508_quote.zip", 167_466),
        ("lean-eurusd/oanda_eurusd_20140508_quote.zip", 87_833),
        ("lean-us-equity/spy_20131008_trade.zip", 451_545),
    ],
)
def test_real_lean_captures_arrive_whole(
    capsys: Captured, data: Path, file: str, published: int
) -> None:
    report = replay_json(capsys, data / file, "--subscribers", "1")
    assert report["messages"] == report["published"] == published
    assert report["delivered"] == [published]


@pytest.mark.real_data
def test_spot_and_futures_of_one_symbol_stay_apart(capsys: Captured, data: Path) -> None:
    files = sorted((data / "binance-raw").glob("*.gz"))
    report = replay_json(capsys, *files, "--subscribers", "1")
    assert report["messages"] == 41_249 + 33_618 + 93_954
    counts = {name: (row["trades"], row["quotes"]) for name, row in report["per_symbol"].items()}
    assert counts == {
        "binance_spot.BTCUSDT": (9_757, 28_040),
        "binance_spot.ETHUSDT": (6_106, 24_077),
        "binance_usdm.BTCUSDT": (21_313, 66_089),
    }
