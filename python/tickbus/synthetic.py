"""A synthetic market: trades and quotes of several symbols at two venues, the same for one seed.

Everything is drawn and kept as integers (ticks, lots, nanoseconds), so that one seed gives the
same market on every machine and totals can be summed without any rounding. `events` turns the
rows into the events that captures give.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple, TypeAlias

from tickbus.captures import MarketEvent, Quote, Trade
from tickbus.errors import ConfigError

__all__ = [
    "INSTRUMENTS",
    "Instrument",
    "MarketRow",
    "QuoteRow",
    "SyntheticMarket",
    "TradeRow",
]


@dataclass(frozen=True, slots=True)
class Instrument:
    """What is traded at one venue.

    Attributes:
        venue: The venue's name.
        symbol: The symbol's name.
        price_decimals: A tick is 10 to the power of minus this, in the quote currency.
        size_decimals: A lot is 10 to the power of minus this, in units.
    """

    venue: str
    symbol: str
    price_decimals: int
    size_decimals: int


class TradeRow(NamedTuple):
    """A trade in integers: `ts_recv` in ns since 1970, `price` in ticks, `size` in lots."""

    ts_recv: int
    instrument: Instrument
    price: int
    size: int


class QuoteRow(NamedTuple):
    """A quote in integers: `ts_recv` in ns since 1970, prices in ticks, sizes in lots."""

    ts_recv: int
    instrument: Instrument
    bid: int
    ask: int
    bid_size: int
    ask_size: int


MarketRow: TypeAlias = TradeRow | QuoteRow

_VENUES = ("sim_east", "sim_west")
_SYMBOLS = (("BTC-USD", 2, 8, 6_100_000), ("ETH-USD", 2, 6, 268_000), ("SOL-USD", 3, 4, 154_000))
"""Name, price decimals, size decimals and first middle price in ticks."""

INSTRUMENTS = tuple(
    Instrument(venue, symbol, price_decimals, size_decimals)
    for symbol, price_decimals, size_decimals, _ in _SYMBOLS
    for venue in _VENUES
)
"""Every symbol at every venue."""


@dataclass(frozen=True, slots=True)
class SyntheticMarket:
    """A market that is drawn anew, and the same, at each reading.

    The middle price of a symbol walks at random and both venues quote around it; about one row
    in four is a trade at the bid or the ask. Rows are 1 ns to 2 ms apart.

    Args:
        seed: Equal seeds give equal markets.
        length: Rows, at least 1.

    Raises:
        ConfigError: `length` is less than 1.
    """

    seed: int = 1
    length: int = 100_000

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"length was {self.length}; it must be at least 1 row")

    def rows(self) -> Iterator[MarketRow]:
        """Yields the market in integers, in the order of time."""
        # Only `random()` is promised to draw the same numbers in every Python version.
        draw = random.Random(self.seed).random
        middles = {symbol: first for symbol, _, _, first in _SYMBOLS}
        ts_recv = _FIRST_TIME
        for _ in range(self.length):
            ts_recv += 1 + int(draw() * _LONGEST_GAP)
            instrument = INSTRUMENTS[int(draw() * len(INSTRUMENTS))]
            step = int(draw() * 11) - 5
            middle = max(middles[instrument.symbol] + step, _LEAST_MIDDLE)
            middles[instrument.symbol] = middle
            half_spread = 1 + int(draw() * 4)
            bid, ask = middle - half_spread, middle + half_spread
            if draw() < _TRADE_SHARE:
                price = bid if draw() < 0.5 else ask
                yield TradeRow(ts_recv, instrument, price, _lots(draw()))
            else:
                yield QuoteRow(ts_recv, instrument, bid, ask, _lots(draw()), _lots(draw()))

    def events(self) -> Iterator[MarketEvent]:
        """Yields the rows as trades and quotes with decimal prices and sizes."""
        for row in self.rows():
            instrument = row.instrument
            venue, symbol = instrument.venue, instrument.symbol
            ticks, lots = instrument.price_decimals, instrument.size_decimals
            if isinstance(row, TradeRow):
                price, size = _decimal(row.price, ticks), _decimal(row.size, lots)
                yield Trade(row.ts_recv, venue, symbol, price, size)
            else:
                yield Quote(
                    row.ts_recv,
                    venue,
                    symbol,
                    _decimal(row.bid, ticks),
                    _decimal(row.ask, ticks),
                    _decimal(row.bid_size, lots),
                    _decimal(row.ask_size, lots),
                )


_FIRST_TIME = 1_704_153_600_000_000_000
"""2024-01-02 00:00:00 UTC, in ns since the Unix epoch."""
_LONGEST_GAP = 2_000_000
_LEAST_MIDDLE = 100
_TRADE_SHARE = 0.25
_MOST_LOTS = 100_000


def _lots(drawn: float) -> int:
    """Returns 1 to `_MOST_LOTS` lots, small ones more often, as sizes are in real markets."""
    return 1 + int(drawn * drawn * drawn * _MOST_LOTS)


def _decimal(count: int, decimals: int) -> Decimal:
    return Decimal(count).scaleb(-decimals)
