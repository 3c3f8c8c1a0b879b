"""Captures as compact events: what `tickbus record` writes into a log, and `Replay` replays.

| message | events | `value` | `metadata` |
|---|---|---|---|
| trade | `trade` | price | units traded |
| quote | `bid`, then `ask` | price | units there |

`timestamp` is that of the message, `source` its venue, `symbol` its instrument. Units are counted
in 1e-8; `UNKNOWN_SIZE` stands where a capture has none. A price is the float whose shortest text is
the price, so that it is read exactly as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Context, Decimal, Inexact, InvalidOperation

from tickbus._core import Event
from tickbus.captures import MarketEvent, Trade
from tickbus.event import EventType

__all__ = [
    "ASK",
    "BID",
    "SIZE_UNIT",
    "TRADE",
    "UNKNOWN_SIZE",
    "InexactError",
    "compact",
    "register",
]

TRADE, BID, ASK = 16, 17, 18
"""Codes of the event types `trade`, `bid` and `ask`."""
SIZE_UNIT = Decimal("1e-8")
"""What `metadata` counts, in units traded or quoted."""
UNKNOWN_SIZE = (1 << 64) - 1
"""The `metadata` of a quote without sizes."""


class InexactError(ValueError):
    """A price or a size has more digits than a compact event can hold."""


def compact(message: MarketEvent) -> Iterator[Event]:
    """Yields the compact events of a message.

    Raises:
        InexactError: A price or a size has more digits than fit.
    """
    if isinstance(message, Trade):
        yield _event(message, TRADE, message.price, message.size)
    else:
        yield _event(message, BID, message.bid, message.bid_size)
        yield _event(message, ASK, message.ask, message.ask_size)


def register() -> None:
    """Gives the types their names in this process.

    Raises:
        ConfigError: A code or a name is taken.
    """
    for name, code in (("trade", TRADE), ("bid", BID), ("ask", ASK)):
        EventType.register(name, code)


def _event(message: MarketEvent, code: int, price: Decimal, size: Decimal | None) -> Event:
    value = float(price)
    if Decimal(repr(value)) != price:
        raise InexactError(f"the price {price} has more digits than a compact event can hold")
    return Event(message.ts_recv, code, 0, message.venue, message.symbol, value, _units(size))


_EXACT = Context(prec=120, traps=[Inexact, InvalidOperation])


def _units(size: Decimal | None) -> int:
    if size is None:
        return UNKNOWN_SIZE
    units = size.scaleb(8, _EXACT)
    if units != int(units) or not 0 <= units < UNKNOWN_SIZE:
        raise InexactError(
            f"the size {size} has more digits than a compact event can hold, which counts in 1e-8"
        )
    return int(units)
