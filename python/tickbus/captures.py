"""Readers of market-data captures: files of recorded trades and quotes, one message a line.

A capture is parsed at this edge into frozen `Trade` and `Quote` events; everything behind it
trusts their types. Prices and sizes are `decimal.Decimal`, exactly as written in the file.
Nothing is skipped silently: a `CaptureReport` closes the sum
`messages == trades + quotes + ignored (by kind) + malformed`. Blank lines and the header of a
CSV file are no messages.

Formats:
    `binance`: raw WebSocket messages as `<receive time, ns> <JSON>`, plain or gzip.
    `lean-forex`: a zip with one CSV of tick quotes: milliseconds since midnight, bid, ask.
    `lean-equity`: a zip with one CSV of tick trades: milliseconds since midnight in New York,
        price x 10,000, quantity, exchange letter, sale condition, suspicious flag.
    `csv`: trades with named columns, plain or gzip; see `CSV_COLUMNS`.
"""

from __future__ import annotations

import csv
import errno
import gzip
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tickbus.errors import ConfigError, ParseError

__all__ = [
    "CSV_COLUMNS",
    "FORMATS",
    "CaptureReport",
    "MarketEvent",
    "Quote",
    "Trade",
    "check_format",
    "read_capture",
    "recognize_format",
    "topic_name",
]

FORMATS = ("binance", "lean-forex", "lean-equity", "csv")
"""Names of the formats that can be read."""

CSV_COLUMNS = {
    "time": ("ts_recv", "ts_event", "timestamp", "time", "ts", "datetime", "date"),
    "symbol": ("symbol", "instrument", "ticker", "pair"),
    "price": ("price", "px"),
    "size": ("size", "quantity", "qty", "amount", "volume"),
    "venue": ("venue", "exchange", "market"),
}
"""Accepted column names of a trades CSV, best first, in any case; only `venue` may be absent."""


@dataclass(frozen=True, slots=True)
class Trade:
    """A trade as one venue reported it.

    Attributes:
        ts_recv: When it was received, or else when the venue says it happened, in ns since the
            Unix epoch, UTC.
        venue: The venue's name; spot and futures of one company are two venues.
        symbol: The instrument's name at that venue.
        price: Price of one unit, in the quote currency.
        size: Units traded, at least 0.
    """

    ts_recv: int
    venue: str
    symbol: str
    price: Decimal
    size: Decimal


@dataclass(frozen=True, slots=True)
class Quote:
    """The best bid and ask of one venue.

    Attributes:
        ts_recv: When it was received, or else when the venue says it was so, in ns since the
            Unix epoch, UTC.
        venue: The venue's name; spot and futures of one company are two venues.
        symbol: The instrument's name at that venue.
        bid: Best bid price, in the quote currency.
        ask: Best ask price; a locked or crossed quote is kept as it was recorded.
        bid_size: Units bid, or `None` where the capture has no sizes.
        ask_size: Units asked, or `None` where the capture has no sizes.
    """

    ts_recv: int
    venue: str
    symbol: str
    bid: Decimal
    ask: Decimal
    bid_size: Decimal | None = None
    ask_size: Decimal | None = None


MarketEvent: TypeAlias = Trade | Quote


@dataclass(slots=True)
class CaptureReport:
    """What became of every message of one or more captures.

    Attributes:
        messages: Lines read, without blank lines and CSV headers.
        trades: Messages that became a `Trade`.
        quotes: Messages that became a `Quote`.
        ignored: Well-formed messages that are neither, counted by kind.
        malformed: Messages that do not have the form of the capture's format.
    """

    messages: int = 0
    trades: int = 0
    quotes: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    malformed: int = 0


def read_capture(
    path: Path,
    format: str | None = None,
    *,
    report: CaptureReport | None = None,
    on_malformed: Callable[[ParseError], None] | None = None,
) -> Iterator[MarketEvent]:
    """Yields the trades and quotes of a capture in the order of the file.

    Args:
        path: The file; compression is recognized by content.
        format: One of `FORMATS`; `None` recognizes it.
        report: Counts are added to it.
        on_malformed: Called for every malformed line, after which reading goes on; `None` raises
            the error instead.

    Raises:
        ConfigError: There is no such format.
        ParseError: The format was not recognized, the file does not name its date or columns as
            its format demands, or a line is malformed and `on_malformed` is `None`.
        OSError: The file cannot be read or is damaged.
    """
    check_format(format)
    name = recognize_format(path) if format is None else format
    counts = CaptureReport() if report is None else report
    lines = enumerate(_lines(path), start=1)
    parse = _parser(path, name, lines)
    for number, raw in lines:
        line = raw.strip()
        if not line:
            continue
        counts.messages += 1
        try:
            outcome = parse(line)
        except _MalformedLine as why:
            counts.malformed += 1
            error = ParseError(why.message, str(path), number, why.position)
            if on_malformed is None:
                raise error from why.__cause__
            on_malformed(error)
            continue
        if isinstance(outcome, Trade):
            counts.trades += 1
            yield outcome
        elif isinstance(outcome, Quote):
            counts.quotes += 1
            yield outcome
        else:
            counts.ignored[outcome] += 1


def check_format(format: str | None) -> None:
    """Refuses what is none of `FORMATS`, nor `None`."""
    if format is not None and format not in FORMATS:
        raise ConfigError(
            f"format was {format!r}; it must be one of {', '.join(FORMATS)}, or None to recognize "
            "it"
        )


def recognize_format(path: Path, *, option: str = "format=") -> str:
    """Returns the one of `FORMATS` that a capture is in, by its content and, for a zip, its member.

    Args:
        path: The file.
        option: What the error advises to name the format with.

    Raises:
        ParseError: None of them fits.
        OSError: The file cannot be read or is damaged.
    """
    if _is_zip(path):
        return "lean-forex" if _lean_name(path).kind == "quote" else "lean-equity"
    number, first = _first_line(enumerate(_lines(path), start=1))
    if re.match(rb"\d+ [{\[]", first):
        return "binance"
    names = {name.strip().strip('"').lower() for name in _text(first).split(",")}
    if names & {*CSV_COLUMNS["price"]} and names & {*CSV_COLUMNS["size"]}:
        return "csv"
    raise ParseError(
        f"the format is none of {', '.join(FORMATS)}; found {_shown(first)}; name it with "
        f"{option} if it is one of them",
        str(path),
        number,
    )


def topic_name(event: MarketEvent) -> str:
    """Returns `trades.<venue>.<symbol>` or `quotes.<venue>.<symbol>`.

    Characters that have a meaning in topics and patterns become `_`, so that each name has
    exactly three levels.
    """
    stream = "trades" if isinstance(event, Trade) else "quotes"
    venue, symbol = (_LEVEL_BREAKERS.sub("_", name) for name in (event.venue, event.symbol))
    return f"{stream}.{venue}.{symbol}"


_Outcome: TypeAlias = MarketEvent | str
_Parser: TypeAlias = Callable[[bytes], _Outcome]

_LEVEL_BREAKERS = re.compile(r"[.*>\s]")
_NANOSECONDS_PER_SECOND = 1_000_000_000
_NANOSECONDS_PER_MILLISECOND = 1_000_000
_LARGEST_TIME = 2**63 - 1
_MOST_DIGITS = 18
_SHOWN_CHARACTERS = 60
_LONGEST_NAME_BYTES = 100
_FXCM_TIME = timezone(timedelta(hours=-5))


class _MalformedLine(Exception):
    """A line that its format does not allow; `read_capture` adds the file and the line."""

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


def _parser(path: Path, format: str, lines: Iterator[tuple[int, bytes]]) -> _Parser:
    """Returns what parses one line; takes the header from `lines` where the format has one."""
    if format == "binance":
        return _parse_binance
    if format == "csv":
        return _csv_parser(path, lines)
    name = _lean_name(path)
    if format == "lean-forex":
        midnight = _midnight(path, name.date, _FXCM_TIME if name.venue == "fxcm" else UTC)
        return partial(_parse_lean_forex, midnight, name.venue, name.symbol)
    midnight = _midnight(path, name.date, _new_york(path))
    return partial(_parse_lean_equity, midnight, name.symbol)


# Binance


def _parse_binance(line: bytes) -> _Outcome:
    stamp, _, payload = line.partition(b" ")
    ts_recv = _time(stamp)
    try:
        message = json.loads(payload)
    except json.JSONDecodeError as why:
        raise _MalformedLine(
            f"wanted JSON after the receive time, found {_shown(payload)} ({why.msg})",
            len(stamp) + 1 + why.pos + 1,
        ) from why
    except (UnicodeDecodeError, RecursionError) as why:
        raise _MalformedLine(f"wanted JSON in UTF-8, found {_shown(payload)}") from why
    if not isinstance(message, dict):
        raise _MalformedLine(f"wanted a JSON object, found {_shown(payload)}")
    stream = message.get("stream")
    if stream is None:
        return _binance_without_stream(message, payload)
    if not isinstance(stream, str):
        raise _MalformedLine(f"wanted a stream name as text, found {stream!r}")
    kind = stream.partition("@")[2].partition("@")[0] or stream.lstrip("!")
    if kind == "trade":
        data = _binance_data(message)
        return Trade(
            ts_recv,
            "binance_spot" if "M" in data else "binance_usdm",
            _symbol(data.get("s")),
            _decimal("price p", data.get("p")),
            _size("quantity q", data.get("q")),
        )
    if kind == "bookTicker":
        data = _binance_data(message)
        return Quote(
            ts_recv,
            "binance_usdm" if "e" in data else "binance_spot",
            _symbol(data.get("s")),
            _decimal("bid price b", data.get("b")),
            _decimal("ask price a", data.get("a")),
            _size("bid quantity B", data.get("B")),
            _size("ask quantity A", data.get("A")),
        )
    return kind


def _binance_without_stream(message: dict[str, Any], payload: bytes) -> str:
    """Returns the kind of a message that is no stream event."""
    if "lastUpdateId" in message:
        return "snapshot"
    if "result" in message or "error" in message:
        return "response"
    raise _MalformedLine(
        f'wanted a "stream", a "lastUpdateId" or a "result", found {_shown(payload)}'
    )


def _binance_data(message: dict[str, Any]) -> dict[str, Any]:
    data = message.get("data")
    if not isinstance(data, dict):
        raise _MalformedLine(f'wanted an object in "data", found {data!r}')
    return data


# Lean


@dataclass(frozen=True, slots=True)
class _LeanName:
    """What the names of a Lean zip and of its one member say."""

    venue: str
    symbol: str
    date: str
    kind: str


_LEAN_MEMBER = re.compile(
    r"(?P<date>\d{8})_(?P<symbol>[^/]+?)_"
    r"(?:tick_(?P<kind>quote|trade)|(?P<other_kind>quote|trade)_tick)\.csv",
    re.IGNORECASE,
)


def _lean_name(path: Path) -> _LeanName:
    if not _is_zip(path):
        raise ParseError(
            "the Lean formats are zip files; this is none, so leave the format out", str(path), 1
        )
    member = _only_member(path)
    match = _LEAN_MEMBER.fullmatch(member)
    if match is None:
        raise ParseError(
            "a Lean zip of ticks holds <yyyymmdd>_<symbol>_tick_<quote or trade>.csv; "
            f"found {member!r}",
            str(path),
            1,
        )
    symbol = match["symbol"].upper()
    return _LeanName(
        _lean_venue(path, symbol),
        symbol,
        match["date"],
        (match["kind"] or match["other_kind"]).lower(),
    )


def _lean_venue(path: Path, symbol: str) -> str:
    """Returns the venue of `<venue>_<symbol>_...zip` or `<venue>/tick/<symbol>/...zip`."""
    prefix, found, _ = path.name.lower().partition(f"_{symbol.lower()}_")
    if found and prefix and not prefix.isdigit():
        return prefix
    folders = path.resolve().parts
    return folders[-4].lower() if len(folders) > 4 and folders[-3] == "tick" else "lean"


def _midnight(path: Path, date: str, zone: tzinfo) -> int:
    """Returns the ns since the Unix epoch at which a day `yyyymmdd` began in a zone."""
    try:
        day = datetime.strptime(date, "%Y%m%d").replace(tzinfo=zone)
    except ValueError as why:
        raise ParseError(
            f"wanted a date yyyymmdd in the member's name, found {date}", str(path), 1
        ) from why
    return int(day.timestamp()) * _NANOSECONDS_PER_SECOND


def _new_york(path: Path) -> ZoneInfo:
    try:
        return ZoneInfo("America/New_York")
    except ZoneInfoNotFoundError as why:
        raise OSError(
            errno.ENOENT,
            "US equity times need the time zone database, which this system lacks; "
            "pip install tzdata",
            str(path),
        ) from why


def _parse_lean_forex(midnight: int, venue: str, symbol: str, line: bytes) -> Quote:
    fields = _text(line).split(",")
    if len(fields) != 3:
        raise _MalformedLine(f"wanted 3 fields (ms, bid, ask), found {len(fields)}")
    moment, bid, ask = fields
    return Quote(
        midnight + _milliseconds(moment),
        venue,
        symbol,
        _decimal("bid", bid),
        _decimal("ask", ask),
    )


def _parse_lean_equity(midnight: int, symbol: str, line: bytes) -> _Outcome:
    fields = _text(line).split(",")
    if len(fields) != 6:
        raise _MalformedLine(
            "wanted 6 fields (ms, price x 10000, quantity, exchange, sale condition, "
            f"suspicious), found {len(fields)}"
        )
    moment, price, size, exchange, _, suspicious = fields
    if suspicious not in ("0", "1"):
        raise _MalformedLine(f"wanted 0 or 1 as suspicious flag, found {suspicious!r}")
    if not (exchange.isascii() and exchange.isalnum()):
        raise _MalformedLine(f"wanted a letter as exchange, found {exchange!r}")
    if not (price.isascii() and price.isdigit()):
        raise _MalformedLine(f"wanted a price x 10000 as a whole number, found {price!r}")
    trade = Trade(
        midnight + _milliseconds(moment),
        f"us_{exchange.lower()}",
        symbol,
        _decimal("price", f"{price}e-4"),
        _size("quantity", size),
    )
    return trade if suspicious == "0" else "suspicious_trade"


def _milliseconds(text: str) -> int:
    """Returns ns of a count of milliseconds since midnight."""
    if not (text.isascii() and text.isdigit() and int(text[:_MOST_DIGITS]) < 86_400_000):
        raise _MalformedLine(f"wanted milliseconds since midnight, found {text!r}")
    return int(text) * _NANOSECONDS_PER_MILLISECOND


# Trades CSV


def _csv_parser(path: Path, lines: Iterator[tuple[int, bytes]]) -> _Parser:
    number, header = _first_line(lines)
    try:
        names = [name.strip().lower() for name in _csv_fields(header)]
    except _MalformedLine as why:
        raise ParseError(why.message, str(path), number) from why
    columns = {
        role: next((names.index(name) for name in accepted if name in names), None)
        for role, accepted in CSV_COLUMNS.items()
    }
    absent = [role for role, column in columns.items() if column is None and role != "venue"]
    if absent:
        wanted = "; ".join(f"{role}: one of {', '.join(CSV_COLUMNS[role])}" for role in absent)
        raise ParseError(
            f"the header lacks columns (wanted {wanted}); found {_shown(header)}",
            str(path),
            number,
        )
    return partial(_parse_csv, len(names), columns)


def _parse_csv(width: int, columns: dict[str, int | None], line: bytes) -> Trade:
    fields = _csv_fields(line)
    if len(fields) != width:
        raise _MalformedLine(f"wanted {width} fields as in the header, found {len(fields)}")
    found = {role: fields[column].strip() for role, column in columns.items() if column is not None}
    return Trade(
        _csv_time(found["time"]),
        _symbol(found.get("venue", "csv")),
        _symbol(found["symbol"]),
        _decimal("price", found["price"]),
        _size("size", found["size"]),
    )


def _csv_fields(line: bytes) -> list[str]:
    try:
        return next(csv.reader([_text(line)], strict=True), [])
    except csv.Error as why:
        raise _MalformedLine(
            f"wanted comma-separated fields, found {_shown(line)} ({why})"
        ) from why


def _csv_time(text: str) -> int:
    """Returns ns of a time as ISO 8601, or as a number whose size tells s, ms, us or ns."""
    whole, _, fraction = text.partition(".")
    if text.isascii() and whole.isdigit() and (fraction.isdigit() or not fraction):
        for most_digits, unit in ((11, 9), (14, 6), (17, 3), (19, 0)):
            if len(whole) <= most_digits:
                return int(whole + fraction.ljust(unit, "0")[:unit])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as why:
        raise _MalformedLine(
            f"wanted a time in s, ms, us or ns since 1970, or as ISO 8601, found {text!r}"
        ) from why
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since_epoch = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return since_epoch // timedelta(microseconds=1) * 1_000


# Fields


def _time(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) > _LARGEST_TIME:
        raise _MalformedLine(
            f"wanted a receive time in ns since 1970 before the JSON, found {_shown(text)}", 1
        )
    return int(text)


def _symbol(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _MalformedLine(f"wanted a name as printable text, found {value!r}")
    if len(value.encode()) > _LONGEST_NAME_BYTES:
        raise _MalformedLine(
            f"wanted a name of at most {_LONGEST_NAME_BYTES} bytes, found {len(value.encode())}"
        )
    return value


def _size(what: str, value: object) -> Decimal:
    number = _decimal(what, value)
    if number < 0:
        raise _MalformedLine(f"wanted a {what} of at least 0, found {value}")
    return number


def _decimal(what: str, value: object) -> Decimal:
    """Returns a number with at most 18 digits on each side of the point, so that sums fit."""
    if not isinstance(value, str) or not value.isascii() or "_" in value:
        raise _MalformedLine(f"wanted a {what} as a decimal number in text, found {value!r}")
    try:
        number = Decimal(value)
    except InvalidOperation as why:
        raise _MalformedLine(f"wanted a {what} as a decimal number, found {value!r}") from why
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        raise _MalformedLine(f"wanted a finite {what}, found {value!r}")
    if exponent < -_MOST_DIGITS or number.adjusted() >= _MOST_DIGITS:
        raise _MalformedLine(
            f"wanted a {what} with at most {_MOST_DIGITS} digits on each side of the point, "
            f"found {value!r}"
        )
    return number


def _text(line: bytes) -> str:
    """Returns the text of a line; bytes that are not UTF-8 become unprintable and fail later."""
    return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _shown(line: bytes) -> str:
    text = line[: _SHOWN_CHARACTERS + 1].decode("utf-8", "replace")
    return (
        "nothing"
        if not text
        else repr(text[:_SHOWN_CHARACTERS]) + ("..." if len(text) > _SHOWN_CHARACTERS else "")
    )


# Files


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a plain file, a gzip file or the one member of a zip."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(b"PK\x03\x04"):
                archive = stack.enter_context(zipfile.ZipFile(file))
                yield from stack.enter_context(archive.open(_only_member(path)))
            elif magic.startswith(b"\x1f\x8b"):
                yield from stack.enter_context(gzip.GzipFile(fileobj=file))
            else:
                yield from file
        except _DAMAGE as why:
            raise OSError(errno.EIO, f"the file is damaged ({why})", str(path)) from why


_DAMAGE = (EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _first_line(lines: Iterator[tuple[int, bytes]]) -> tuple[int, bytes]:
    """Returns the first line that is not blank, with its number; nothing where there is none."""
    for number, raw in lines:
        if line := raw.strip():
            return number, line
    return 1, b""


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _only_member(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
    except _DAMAGE as why:
        raise OSError(errno.EIO, f"the file is damaged ({why})", str(path)) from why
    if len(members) != 1:
        raise ParseError(f"wanted one file in the zip, found {len(members)}", str(path), 1)
    return members[0]
