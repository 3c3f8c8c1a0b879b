"""Commands, their options and their exit codes."""

from __future__ import annotations

import asyncio
import gc
import heapq
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal, TypeAlias, TypeVar

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tickbus import (
    AlreadyOpen,
    ConfigError,
    Corrupt,
    EventStore,
    EventType,
    ParseError,
    StoreError,
    StoreIO,
    StoreStats,
    __version__,
    _core,
)
from tickbus.captures import CaptureReport, MarketEvent, Trade, read_capture, recognize_format
from tickbus.cli.export import export, format_of
from tickbus.cli.log_report import (
    ExportReport,
    InspectReport,
    LiveReport,
    LogReplayReport,
    NumbersReport,
    RecordReport,
    RepairReport,
    VerifyReport,
)
from tickbus.cli.oracle import tally_capture, tally_synthetic
from tickbus.cli.record import record
from tickbus.cli.record_live import (
    LiveProgress,
    UnusableError,
    find,
    is_reference,
    record_live,
)
from tickbus.cli.replay import ReplayOutcome, ReplayPlan, replay
from tickbus.cli.replay_log import LogOutcome, replay_log, tally_log
from tickbus.cli.report import ReplayReport
from tickbus.cli.totals import Instruments
from tickbus.compact import InexactError, register
from tickbus.store import inspect, salvage, survey
from tickbus.synthetic import SyntheticMarket

__all__ = ["CUT_OFF", "DONE", "FAILED", "INTERRUPTED", "UNREADABLE", "USAGE", "run"]

DONE, FAILED, USAGE, UNREADABLE, INTERRUPTED, CUT_OFF = 0, 1, 2, 3, 130, 141

_Outcome = TypeVar("_Outcome")
_Report: TypeAlias = NumbersReport | InspectReport | ReplayReport

app = App(
    name="tickbus",
    help="An event bus for market data: commands that show and check it.",
    version=__version__,
    help_epilogue=(
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 unreadable input, 130 interrupted, "
        "141 nobody reads the output."
    ),
    suppress_keyboard_interrupt=False,
)
log = App(name="log", help="Look into event logs.")
app.command(log)


def run(argv: Sequence[str]) -> int:
    """Runs the command that the arguments name and returns its exit code."""
    try:
        code = _run(argv)
        print(end="", flush=True)
    except BrokenPipeError:
        # The interpreter writes what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        code = app(
            list(argv), console=_Console(), exit_on_error=False, result_action="return_value"
        )
    except CycloptsError:
        return USAGE  # It has been printed.
    except ConfigError as why:
        _complain(str(why))
        return USAGE
    except KeyboardInterrupt:
        _complain("interrupted; everything is closed")
        return INTERRUPTED
    return code if isinstance(code, int) else DONE


@app.command(
    name="replay",
    help_epilogue=(
        "Example: tickbus replay --subscribers 8 --speed 10 spot_btcusdt_20240808.gz; of a log: "
        "tickbus replay --json LOG"
    ),
)
def replay_command(
    *files: Path,
    format: Literal["binance", "lean-forex", "lean-equity", "csv"] | None = None,
    speed: float = 0.0,
    subscribers: int = 4,
    backend: str | None = None,
    capacity: int = 10_000,
    max_gap: float = 3_600.0,
    compare: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    strict: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 1,
    events: int = 100_000,
) -> int:
    """Replay market data or a log from a thread through the bus to asyncio subscribers.

    Each subscriber computes count, volume and VWAP per symbol; the results must equal those of
    an independent pass over the input, or the command fails. Captures are read into memory
    first, so that events/s measures the bus. Without a file a synthetic market is replayed. Of a
    log, which is replayed as it is read, the digest of what was replayed is told too.

    Args:
        files: Captures, of which several are merged by their times, or the folder of one log.
        format: The files' format; recognized when left out.
        speed: Recorded time per real time: 1 as recorded, 10 ten times faster, 0 flat out.
        subscribers: Number of asyncio subscribers.
        backend: lock_free, broadcast or ring; else the environment variable TICKBUS_BACKEND, else
            lock_free.
        capacity: Events that a subscription holds.
        max_gap: Seconds of recorded time; longer gaps are not waited for.
        compare: Replay the same events over the other backends too, and show them side by side.
        json: Print one JSON object instead of tables.
        strict: Stop at the first malformed line.
        seed: Seed of the synthetic market.
        events: Events of the synthetic market.
    """
    plan = ReplayPlan(backend, subscribers, capacity, speed, max_gap)
    _check(plan)
    if any(path.is_dir() for path in files):
        if len(files) > 1 or format is not None or compare or strict:
            raise ConfigError(
                "a log is replayed alone, and without --format, --compare and --strict"
            )
        return _replay_log(files[0], plan, as_json=json)
    market = None if files else SyntheticMarket(seed, events)
    report = CaptureReport()
    try:
        formats = [format or recognize_format(path, option="--format") for path in files]
    except (OSError, ParseError) as why:
        return _unreadable(why)
    try:
        loaded = (
            _synthesize(market, report)
            if market
            else _load(files, formats, report, stops_at_malformed=strict)
        )
        oracle = tally_synthetic(market.rows()) if market else _tally(files, formats)
    except (OSError, ParseError) as why:
        return _unreadable(why)
    except _StoppedAtMalformedError:
        return FAILED
    # Without this the collector would walk the whole input during the replay and be measured.
    gc.freeze()
    try:
        outcome = _replay_showing_progress(loaded, plan)
        names = [name for name in _core._backends() if compare and name != outcome.backend]
        others = [_replay_showing_progress(loaded, changed(plan, backend=name)) for name in names]
    finally:
        gc.unfreeze()
    source = ", ".join(path.name for path in files) or f"a synthetic market, seed {seed}"
    result = ReplayReport(source, plan, report, outcome, oracle, tuple(others))
    return _conclude(result, as_json=json)


@app.command(
    name="record",
    help_epilogue=(
        "Examples: tickbus record spot_btcusdt_20240808.gz --to LOG; "
        "tickbus record market:bus --to LOG; tickbus record market:feed --to LOG, where market.py "
        "has `async def feed(): bus = EventBus(); tasks.add(asyncio.create_task(publish(bus))); "
        "return bus`"
    ),
)
def record_command(
    source: Path,
    /,
    *files: Path,
    to: Path,
    durability: str = "group",
    format: Literal["binance", "lean-forex", "lean-equity", "csv"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    strict: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Record market data or a live bus into an event log, behind what it has.

    Of a capture, a trade becomes an event of type trade, a quote one of type bid and one of type
    ask. Their value is the price and their metadata the size in 1e-8 units; what does not fit
    exactly is an error.

    A live bus is MODULE:ATTRIBUTE, imported from the working directory or where Python looks for
    modules: an EventSystem, an EventBus or a TypedEventBus, or a function that makes and runs one.
    A coroutine function and one that returns a context manager are awaited and entered in an event
    loop: they make the bus, begin the tasks that publish, keep them, and return the bus. It is
    recorded until it is closed, or until Ctrl-C or SIGTERM, which end it in order; the second one
    ends it at once.

    Args:
        source: A capture, or MODULE:ATTRIBUTE.
        files: More captures; all are merged by their times.
        to: The folder of the log, made where there is none.
        durability: none, interval(100) with milliseconds, group, always or double.
        format: The captures' format; recognized when left out.
        json: Print one JSON object instead of a table.
        strict: Stop at the first malformed line of a capture.
    """
    if not source.exists() and is_reference(str(source)):
        if files or format or strict:
            raise ConfigError(
                f"{source} is a live bus, which is recorded alone; more files, --format and "
                "--strict are for captures"
            )
        return _record_live(str(source), to, durability, as_json=json)
    captures = (source, *files)
    report = CaptureReport()
    try:
        formats = [format or recognize_format(path, option="--format") for path in captures]
        messages = _merge(captures, formats, report, stops_at_malformed=strict)
        # Of what cannot be read at all no log is made.
        first = list(islice(messages, 1))
        with (
            _opened(to, durability) as store,
            _telling_what_is_kept(store, to),
            _counting("recording") as progress,
        ):
            recorded = record(chain(first, messages), store, progress)
    except StoreError as why:
        return _failed_log(why, to)
    except InexactError as why:
        _complain(str(why))
        return FAILED
    except FileNotFoundError as why:
        return _unreadable(why, "; a live bus is MODULE:ATTRIBUTE, as in market:bus, and no call")
    except (OSError, ParseError) as why:
        return _unreadable(why)
    except _StoppedAtMalformedError:
        return FAILED
    names = ", ".join(path.name for path in captures)
    result = RecordReport(names, to, report, recorded)
    _show(result, as_json=json)
    return DONE


def _record_live(reference: str, to: Path, durability: str, *, as_json: bool) -> int:
    try:
        found = find(reference)
        with (
            _opened(to, durability) as store,
            _telling_what_is_logged(),
            _recording(reference) as on_attached,
        ):
            recorded = asyncio.run(record_live(reference, found, store, on_attached, _complain))
    except StoreError as why:
        return _failed_log(why, to)
    except UnusableError as why:
        return _unreadable(why)
    _show(LiveReport(reference, to, recorded), as_json=as_json)
    if recorded.failure is not None:
        _complain(f"the log took no more; {recorded.failure}")
    return FAILED if recorded.failure is not None or recorded.errors else DONE


@contextmanager
def _opened(to: Path, durability: str) -> Iterator[EventStore]:
    """Opens a log to record into it, and says what that has cut off."""
    with EventStore.open(to, durability=durability) as store:
        if cut := store.recovery.cut_bytes:
            _complain(
                f"{to} was torn: {cut:,} bytes with {store.recovery.cut_records:,} records, which "
                "were never acknowledged, were cut off"
            )
        yield store


@contextmanager
def _telling_what_is_kept(store: EventStore, to: Path) -> Iterator[None]:
    """Says what a recording that does not come to its end has written."""
    first = store.stats().next_sequence
    try:
        yield
    except StoreError:
        raise
    except BaseException:
        _complain(f"{to} keeps the {store.stats().next_sequence - first:,} events before this:")
        raise


@contextmanager
def _telling_what_is_logged() -> Iterator[None]:
    """Says what the package warns of."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _complain(record.getMessage())

    told = Told(logging.WARNING)
    logger = logging.getLogger("tickbus")
    logger.addHandler(told)
    try:
        yield
    finally:
        logger.removeHandler(told)


@log.command(name="inspect")
def inspect_command(path: Path, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Show what is in the files of a log, whole or not.

    Args:
        path: The folder of the log.
        json: Print one JSON object instead of a table.
    """
    try:
        with _counting("reading"):
            segments = inspect(path)
    except StoreError as why:
        return _unreadable_log(why, path)
    _show(InspectReport(path, tuple(segments)), as_json=json)
    return DONE


@log.command(
    name="verify", help_epilogue="Exit codes: 0 sound, 1 damaged, 2 wrong usage, 3 unreadable."
)
def verify_command(path: Path, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Read all of a log and compare it with its checksums; it may be written meanwhile.

    Args:
        path: The folder of the log.
        json: Print one JSON object instead of a table.
    """
    try:
        with _counting("verifying"):
            result = VerifyReport(path, EventStore.verify(path))
    except Corrupt as why:
        result = VerifyReport(path, why)
        _failed_log(why, path)
    except StoreError as why:
        return _unreadable_log(why, path)
    _show(result, as_json=json)
    return DONE if result.sound else FAILED


@log.command(
    name="export",
    help_epilogue="Example: tickbus log export LOG --to trades.parquet --types trade",
)
def export_command(
    path: Path,
    /,
    *,
    to: Path,
    format: Literal["csv", "parquet", "arrow"] | None = None,
    start: str | None = None,
    stop: str | None = None,
    types: list[str] | None = None,
    symbols: list[str] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write what a log has into a file, as a table.

    Args:
        path: The folder of the log.
        to: The file, which must not be there yet.
        format: The file's format; that of its ending when left out.
        start: The lowest time, in ns since the Unix epoch or as in 2024-08-08T12:00:00Z.
        stop: The time before which they are.
        types: Event types; objects have none, so that this leaves them out.
        symbols: Symbols; objects have none either.
        json: Print one JSON object instead of a table.
    """
    name = format_of(to, format)
    first, behind = _moment("--start", start), _moment("--stop", stop)
    if first is not None and behind is not None and first >= behind:
        raise ConfigError(f"--start was {start} and --stop {stop}; --start must be before --stop")
    wanted = {"start": first, "stop": behind, "types": types or None, "symbols": symbols or None}
    # Whoever asks for the types that `record` writes need not have read any.
    register()
    try:
        with _counting("exporting") as progress:
            exported = export(path, to, name, progress, **wanted)
        stats = _stats(path)
    except StoreError as why:
        return _unreadable_log(why, path)
    except ParseError as why:
        return _unreadable(why)
    except ConfigError:
        _check_types(types or ())
        raise
    except OSError as why:
        if why.filename == str(path):
            return _unreadable(why)
        _complain(f"{to} cannot be written; {why.strerror or why}")
        return FAILED
    except (ModuleNotFoundError, InexactError) as why:
        _complain(str(why))
        return FAILED
    if not exported.events + exported.objects:
        _complain(f"{path} has no such record; {to} has no rows")
    _tell_what_is_left(path, stats)
    _show(ExportReport(path, to, exported), as_json=json)
    return DONE


@log.command(
    name="repair",
    help_epilogue=(
        "Exit codes: 0 nothing is damaged, or the new log is written; 1 it is damaged, and no log "
        "was written; 2 wrong usage; 3 unreadable. "
        "Example: tickbus log repair LOG --to NEW --yes"
    ),
)
def repair_command(
    path: Path,
    /,
    *,
    to: Path | None = None,
    yes: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show which records of a damaged log are whole, and write those into a new log.

    The damaged log is never changed. Every record keeps its sequence; each one that is lost is a
    gap in its place. A log that is only torn needs no repair: opening it for writing cuts off what
    was never acknowledged.

    Args:
        path: The folder of the damaged log.
        to: The folder of the new log, which must not be there yet.
        yes: Write it; without this nothing is written.
        json: Print one JSON object instead of a table.
    """
    if yes and to is None:
        _complain("--yes was given without --to; name the folder of the new log")
        return USAGE
    try:
        with _counting("reading"):
            found = survey(path)
    except StoreError as why:
        return _unreadable_log(why, path)
    new = to if yes else None
    if new is not None:
        try:
            with _counting("writing"):
                salvage(path, new)
        except StoreError as why:
            _complain(str(why))
            return FAILED
    _show(RepairReport(path, new, found), as_json=json)
    if new is None and (found.damaged or to is not None):
        missing = "--to NEW --yes" if to is None else "--yes"
        _complain(f"nothing was written; give {missing} to write what is whole into a new log")
    return FAILED if new is None and found.damaged else DONE


class _StoppedAtMalformedError(Exception):
    """A malformed line was found and reported, and the user asked to stop there."""


def _check(plan: ReplayPlan) -> None:
    """Raises `ConfigError` for numbers that no replay can keep."""
    if plan.subscribers < 1:
        raise ConfigError(f"--subscribers was {plan.subscribers}; it must be at least 1")
    for name, value in (("--speed", plan.speed), ("--max-gap", plan.longest_gap)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} was {value}; it must be a finite number of at least 0")


def _load(
    files: Sequence[Path],
    formats: Sequence[str],
    report: CaptureReport,
    *,
    stops_at_malformed: bool,
) -> list[MarketEvent]:
    """Returns the events of all files in the order of time, each file's own order kept."""
    return list(_merge(files, formats, report, stops_at_malformed=stops_at_malformed))


def _merge(
    files: Sequence[Path],
    formats: Sequence[str],
    report: CaptureReport,
    *,
    stops_at_malformed: bool,
) -> Iterator[MarketEvent]:
    """Returns the events of all files as they are read, in the order of time."""

    def on_malformed(error: ParseError) -> None:
        _complain(str(error))
        if stops_at_malformed:
            raise _StoppedAtMalformedError

    streams = [
        read_capture(path, format, report=report, on_malformed=on_malformed)
        for path, format in zip(files, formats, strict=True)
    ]
    return heapq.merge(*streams, key=lambda event: event.ts_recv)


def _synthesize(market: SyntheticMarket, report: CaptureReport) -> list[MarketEvent]:
    loaded = list(market.events())
    report.messages = len(loaded)
    report.trades = sum(isinstance(event, Trade) for event in loaded)
    report.quotes = report.messages - report.trades
    return loaded


def _tally(files: Sequence[Path], formats: Sequence[str]) -> Instruments:
    """Returns the independent totals over all files."""
    sums: Instruments = {}
    for path, format in zip(files, formats, strict=True):
        for key, total in tally_capture(path, format).items():
            if key in sums:
                sums[key].add(total)
            else:
                sums[key] = total
    return sums


def _stats(path: Path) -> StoreStats:
    with EventStore.open(path, read_only=True) as store:
        return store.stats()


def _tell_what_is_left(path: Path, stats: StoreStats) -> None:
    """Says how many records of a log are left out because nothing says that they are durable."""
    durable = 0 if stats.durable_sequence is None else stats.durable_sequence + 1
    left = stats.next_sequence - max(durable, stats.oldest_sequence)
    if left > 0:
        _complain(
            f"{path} has {left:,} more records, which are left out: nothing says that they are on "
            "the disk; sync them, or open the log for writing once its writer has ended"
        )


def _replay_log(path: Path, plan: ReplayPlan, *, as_json: bool) -> int:
    def run(on_progress: Callable[[int], None] | None) -> LogOutcome:
        return asyncio.run(replay_log(path, plan, on_progress))

    try:
        stats = _stats(path)
        outcome = _showing_progress(stats.next_sequence - stats.oldest_sequence, run)
        oracle = tally_log(path)
    except StoreError as why:
        return _unreadable_log(why, path)
    result = LogReplayReport(path, plan, outcome, oracle)
    _tell_what_is_left(path, stats)
    _show(result, as_json=as_json)
    if not result.accounted:
        _complain(
            f"every subscriber must get all of the {outcome.replayed:,} records and sum what an "
            f"independent pass over the log sums; {outcome.lost:,} deliveries were lost"
        )
    return DONE if result.accounted else FAILED


def _moment(name: str, text: str | None) -> int | None:
    """Returns a time in ns since the Unix epoch."""
    if text is None or text.isdigit():
        return None if text is None else int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as why:
        raise ConfigError(
            f"{name} was {text!r}; it must be a number of ns since the Unix epoch, or a time as in "
            "2024-08-08T12:00:00Z"
        ) from why
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1_000


def _check_types(names: Sequence[str]) -> None:
    """Raises `ConfigError` for the names of event types that nobody knows."""
    known = [kind.name for kind in EventType.known() if kind.name]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--types was {name!r}; it must be one of {', '.join(known)}: repeat --types for "
                "each"
            )


_EPOCH = datetime.fromtimestamp(0, UTC)


def _replay_showing_progress(events: Sequence[MarketEvent], plan: ReplayPlan) -> ReplayOutcome:
    return _showing_progress(
        len(events), lambda on_progress: asyncio.run(replay(events, plan, on_progress))
    )


def _showing_progress(
    total: int, run: Callable[[Callable[[int], None] | None], _Outcome]
) -> _Outcome:
    """Replays with a progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        return run(None)
    columns = TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total)
        return run(lambda done: progress.update(bar, completed=done))


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int], None]]:
    """Shows how much was done, on stderr if that is a terminal; gives what is to be told."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = SpinnerColumn(), TextColumn(what), TextColumn("{task.fields[done]}")
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=None, done="")
        yield lambda done: progress.update(bar, done=f"{done:,}")


@contextmanager
def _recording(reference: str) -> Iterator[Callable[[Callable[[], LiveProgress]], None]]:
    """Shows how a recording goes, on stderr if that is a terminal; gives what is told its numbers.

    The display asks for them in a thread of its own: what is recorded may keep the loop busy.
    """
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    state = _State(reference)
    columns = SpinnerColumn(), state, TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task("", total=None)
        yield state.show


class _Console(Console):
    """A console that tells `run` when nobody reads the output."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _State(ProgressColumn):
    """How far the recording of a bus is."""

    def __init__(self, reference: str) -> None:
        super().__init__()
        self._reference = reference
        self._progress: Callable[[], LiveProgress] | None = None

    def show(self, progress: Callable[[], LiveProgress]) -> None:
        """Shows these numbers from now on."""
        self._progress = progress

    def render(self, task: Task) -> Text:
        """Returns what is shown now."""
        if self._progress is None:
            return Text(f"waiting for {self._reference} to return a bus")
        now = self._progress()
        missed = f", {now.missed:,} missed" if now.missed else ""
        return Text(
            f"recording {now.records:,} records, {now.rate:,.0f}/s, {now.durable:,} durable{missed}"
        )


def _show(report: _Report, *, as_json: bool) -> None:
    if as_json:
        print(report.as_json())
    else:
        report.print(_console())


def _unreadable_log(why: StoreError, path: Path) -> int:
    """Says why a log was not read, and what to do; returns the exit code."""
    if isinstance(why, (Corrupt, AlreadyOpen)):
        return _failed_log(why, path)
    _complain(f"the log cannot be read; {_reason(why, path)}")
    return UNREADABLE


def _failed_log(why: StoreError, path: Path) -> int:
    _complain(_reason(why, path))
    return FAILED


def _reason(why: StoreError, path: Path) -> str:
    """Returns why a log cannot be used, and what to do from a command line."""
    if isinstance(why, Corrupt):
        return f"{why}, or see what is whole of it with: tickbus log repair {quote(str(path))}"
    if isinstance(why, AlreadyOpen):
        # The error's own advice is for programs, which may open it to read only.
        writer = "another process" if why.process is None else f"process {why.process}"
        return f"{path} is being written by {writer}; a log has one writer: end that process first"
    if path.exists() and not path.is_dir():
        return f"{path} is no folder; give the folder of a log"
    return (isinstance(why, StoreIO) and why.strerror) or str(why)


def _conclude(report: ReplayReport, *, as_json: bool) -> int:
    _show(report, as_json=as_json)
    differences = report.differences()
    for line in differences:
        _complain(line)
    if not report.accounted:
        lost = sum(outcome.lost for outcome in report.outcomes)
        shortfalls = sum(outcome.shortfalls for outcome in report.outcomes)
        _complain(
            "every message must be accounted for and every event taken by every subscriber; of "
            f"{report.input.messages:,} messages {report.outcome.published:,} were published, "
            f"{report.input.ignored.total():,} ignored and {report.input.malformed:,} malformed; "
            f"{lost:,} deliveries were lost and {shortfalls:,} publishes reached fewer subscribers"
        )
    return DONE if report.accounted and not differences else FAILED


def _console() -> Console:
    """Returns the console for results; a file or pipe, which has no width, gets a wide one."""
    return _Console(width=None if sys.stdout.isatty() else 120)


def _unreadable(why: Exception, hint: str = "") -> int:
    reason = f"{why.filename}: {why.strerror}" if isinstance(why, OSError) else str(why)
    _complain(f"the input cannot be read; {reason}{hint}")
    return UNREADABLE


def _complain(message: str) -> None:
    print(f"tickbus: {message}", file=sys.stderr)
