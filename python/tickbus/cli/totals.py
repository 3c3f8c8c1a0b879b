"""What is summed per venue and symbol, and the arithmetic that never rounds."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from typing import TypeAlias

__all__ = ["EXACT", "Instruments", "Totals"]

EXACT = Context(prec=120, traps=[Inexact, InvalidOperation, Overflow])
"""Arithmetic that raises where it would round: prices and sizes have at most 36 digits, so a
product has 72, which leaves 48 for carrying over the sum."""


@dataclass(slots=True)
class Totals:
    """The totals of one symbol at one venue.

    Attributes:
        trades: Number of trades.
        volume: Sum of the trades' sizes, in units.
        notional: Sum of the trades' price times size, in the quote currency.
        quotes: Number of quotes.
        bid_sum: Sum of the quotes' bids.
        ask_sum: Sum of the quotes' asks.
    """

    trades: int = 0
    volume: Decimal = Decimal(0)
    notional: Decimal = Decimal(0)
    quotes: int = 0
    bid_sum: Decimal = Decimal(0)
    ask_sum: Decimal = Decimal(0)

    def add(self, other: Totals) -> None:
        """Adds the totals of another part of the same instrument's history, exactly."""
        self.trades += other.trades
        self.volume = EXACT.add(self.volume, other.volume)
        self.notional = EXACT.add(self.notional, other.notional)
        self.quotes += other.quotes
        self.bid_sum = EXACT.add(self.bid_sum, other.bid_sum)
        self.ask_sum = EXACT.add(self.ask_sum, other.ask_sum)

    @property
    def vwap(self) -> Decimal | None:
        """The volume-weighted average price, rounded to 28 digits; `None` without volume."""
        return self.notional / self.volume if self.volume else None

    @property
    def mean_mid(self) -> Decimal | None:
        """The mean of the quotes' middle prices, rounded to 28 digits; `None` without quotes."""
        return (self.bid_sum + self.ask_sum) / (2 * self.quotes) if self.quotes else None


Instruments: TypeAlias = dict[tuple[str, str], Totals]
"""Totals by venue and symbol."""
