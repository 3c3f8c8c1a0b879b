"""An independent second pass over the input, to check what came through the bus.

It shares no parsing code with `tickbus.captures`: it opens the files by itself, cuts lines as
bytes and with regular expressions where the reader decodes JSON and CSV, and sums synthetic
markets as integers where the replay sums decimals. Counts and sums are exact.
"""

from __future__ import annotations

import gzip
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from tickbus.cli.totals import EXACT, Instruments, Totals
from tickbus.synthetic import Instrument, MarketRow, TradeRow

__all__ = ["tally_capture", "tally_synthetic"]


def tally_capture(path: Path, format: str) -> Instruments:
    """Returns the totals of every instrument in a capture.

    Args:
        path: The file.
        format: One of `tickbus.captures.FORMATS`.
    """
    totals: Instruments = defaultdict(Totals)
    with _opened(path) as (file, member):
        match format:
            case "binance":
                _tally_binance(file, totals)
            case "lean-forex":
                _tally_lean_forex(file, path, member, totals)
            case "lean-equity":
                _tally_lean_equity(file, member, totals)
            case _:  # csv
                _tally_csv(file, totals)
    return dict(totals)


def tally_synthetic(rows: Iterable[MarketRow]) -> Instruments:
    """Returns the totals of a synthetic market, summed as integers and scaled once at the end."""
    sums: dict[Instrument, list[int]] = defaultdict(lambda: [0] * 6)
    for row in rows:
        sum_of = sums[row.instrument]
        if isinstance(row, TradeRow):
            sum_of[0] += 1
            sum_of[1] += row.size
            sum_of[2] += row.price * row.size
        else:
            sum_of[3] += 1
            sum_of[4] += row.bid
            sum_of[5] += row.ask
    totals: Instruments = {}
    for instrument, (trades, volume, notional, quotes, bids, asks) in sums.items():
        ticks, lots = instrument.price_decimals, instrument.size_decimals
        totals[instrument.venue, instrument.symbol] = Totals(
            trades,
            EXACT.scaleb(Decimal(volume), -lots),
            EXACT.scaleb(Decimal(notional), -ticks - lots),
            quotes,
            EXACT.scaleb(Decimal(bids), -ticks),
            EXACT.scaleb(Decimal(asks), -ticks),
        )
    return totals


_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
_BINANCE_LINE = re.compile(
    rb'\d{1,19} \{"stream":\s*"[^"@]*@?(trade|bookTicker)",\s*"data":\s*\{([^{}]*)\}\s*\}'
)
_BINANCE_PAIR = re.compile(
    rb'"(\w+)":\s*(?:"([^"\\]*)"|(?:true|false|null|-?[\d.eE+-]+))\s*(?:,|$)'
)
_CSV_FIELD = re.compile(rb'(?:"((?:[^"]|"")*)"|([^",][^,]*|))(?:,|$)')
_EPOCH_TIME = re.compile(rb"\d{1,19}(?:\.\d*)?")
_MOST_DIGITS = 18
_MILLISECONDS_PER_DAY = 86_400_000


def _tally_binance(file: Iterable[bytes], totals: Instruments) -> None:
    for line in file:
        match = _BINANCE_LINE.fullmatch(line.strip())
        if match is None:
            continue
        pairs = dict(_BINANCE_PAIR.findall(match[2]))
        symbol = pairs.get(b"s", b"").decode()
        if match[1] == b"trade":
            venue = "binance_spot" if b"M" in pairs else "binance_usdm"
            _add_trade(totals, venue, symbol, pairs.get(b"p", b""), pairs.get(b"q", b""))
        elif _is_size(pairs.get(b"B", b"")) and _is_size(pairs.get(b"A", b"")):
            venue = "binance_usdm" if b"e" in pairs else "binance_spot"
            _add_quote(totals, venue, symbol, pairs.get(b"b", b""), pairs.get(b"a", b""))


def _tally_lean_forex(file: Iterable[bytes], path: Path, member: str, totals: Instruments) -> None:
    symbol = member.split("_")[1]
    named = re.match(rf"(.*[a-z].*)_{re.escape(symbol)}_", path.name, re.IGNORECASE)
    tick = path.resolve().parent.parent
    venue = named[1] if named else tick.parent.name if tick.name == "tick" else "lean"
    venue = venue.lower()
    for line in file:
        fields = line.strip().split(b",")
        if len(fields) == 3 and _is_time_of_day(fields[0]):
            _add_quote(totals, venue, symbol.upper(), fields[1], fields[2])


def _tally_lean_equity(file: Iterable[bytes], member: str, totals: Instruments) -> None:
    symbol = member.split("_")[1].upper()
    for line in file:
        fields = line.strip().split(b",")
        if len(fields) != 6 or not _is_time_of_day(fields[0]) or fields[5] != b"0":
            continue
        if fields[1].isdigit() and fields[3].isalnum():
            venue = "us_" + fields[3].decode().lower()
            _add_trade(totals, venue, symbol, fields[1] + b"e-4", fields[2])


def _tally_csv(file: Iterable[bytes], totals: Instruments) -> None:
    lines = (line.strip() for line in file)
    header = next((line for line in lines if line), b"").removeprefix(b"\xef\xbb\xbf").lower()
    names = _csv_fields(header)
    price = _column(names, b"price", b"px")
    size = _column(names, b"size", b"quantity", b"qty", b"amount", b"volume")
    symbol = _column(names, b"symbol", b"instrument", b"ticker", b"pair")
    venue = _column(names, b"venue", b"exchange", b"market")
    time = _column(
        names, b"ts_recv", b"ts_event", b"timestamp", b"time", b"ts", b"datetime", b"date"
    )
    if price is None or size is None or symbol is None or time is None:
        return
    for line in lines:
        fields = _csv_fields(line)
        if len(fields) != len(names) or not _is_time(fields[time]):
            continue
        place = "csv" if venue is None else fields[venue].decode("utf-8", "replace")
        name = fields[symbol].decode("utf-8", "replace")
        _add_trade(totals, place, name, fields[price], fields[size])


def _csv_fields(line: bytes) -> list[bytes]:
    """Returns the fields of a line, or none where the line does not consist of fields."""
    fields, position = [], 0
    while True:
        match = _CSV_FIELD.match(line, position)
        if match is None:
            return []
        quoted = match[1]
        fields.append(match[2].strip() if quoted is None else quoted.replace(b'""', b'"').strip())
        if not match[0].endswith(b","):
            return fields
        position = match.end()


def _column(names: list[bytes], *accepted: bytes) -> int | None:
    return next((names.index(name) for name in accepted if name in names), None)


def _add_trade(totals: Instruments, venue: str, symbol: str, price: bytes, size: bytes) -> None:
    price_number, size_number = _number(price), _number(size)
    if price_number is None or size_number is None or size_number < 0 or not (venue and symbol):
        return
    total = totals[venue, symbol]
    total.trades += 1
    total.volume = EXACT.add(total.volume, size_number)
    total.notional = EXACT.fma(price_number, size_number, total.notional)


def _add_quote(totals: Instruments, venue: str, symbol: str, bid: bytes, ask: bytes) -> None:
    bid_number, ask_number = _number(bid), _number(ask)
    if bid_number is None or ask_number is None or not symbol:
        return
    total = totals[venue, symbol]
    total.quotes += 1
    total.bid_sum = EXACT.add(total.bid_sum, bid_number)
    total.ask_sum = EXACT.add(total.ask_sum, ask_number)


def _is_size(text: bytes) -> bool:
    number = _number(text)
    return number is not None and number >= 0


def _is_time_of_day(text: bytes) -> bool:
    return text.isdigit() and int(text[:_MOST_DIGITS]) < _MILLISECONDS_PER_DAY


def _is_time(text: bytes) -> bool:
    if _EPOCH_TIME.fullmatch(text):
        return True
    try:
        datetime.fromisoformat(text.decode())
    except ValueError:
        return False
    return True


def _number(text: bytes) -> Decimal | None:
    """Returns a number below 10^18 with at most 18 decimals, as a capture may hold."""
    if not _NUMBER.fullmatch(text):
        return None
    number = Decimal(text.decode())
    _, digits, exponent = number.as_tuple()
    if not isinstance(exponent, int) or not -_MOST_DIGITS <= exponent <= _MOST_DIGITS - len(digits):
        return None
    return number


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Iterable[bytes], str]]:
    """Gives the decompressed file and, for a zip, the name of its member."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (name for name in archive.namelist() if not name.endswith("/"))
            with archive.open(member) as file:
                yield file, member
    else:
        with path.open("rb") as plain:
            magic = plain.peek(2)[:2]
            if magic == b"\x1f\x8b":
                with gzip.open(plain) as file:
                    yield file, ""
            else:
                yield plain, ""
