"""Captures as compact events: what `tickbus record` writes into a log.

| message | events | `value` | `metadata` |
|---|---|---|---|
| trade | `trade` | price | units traded |
| quote | `bid`, then `ask` | price | units there |

`timestamp` is that of the message, `source` its venue, `symbol` its instrument. Units are counted
in 1e-8; `UNKNOWN_SIZE` stands where a capture has none. A price is the float whose shortest text is
the price, so that it is read exactly as it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice

from tickbus import Event, EventBatch, EventStore, EventType
from tickbus.captures import MarketEvent, Trade
from tickbus.cli.totals import EXACT

__all__ = [
    "ASK",
    "BID",
    "SIZE_UNIT",
    "TRADE",
    "UNKNOWN_SIZE",
    "InexactError",
    "Recorded",
    "compact",
    "record",
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


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was written into a log.

    Attributes:
        messages: Messages.
        sequences: Their events.
    """

    messages: int
    sequences: range


def record(
    messages: Iterable[MarketEvent], store: EventStore, on_progress: Callable[[int], None]
) -> Recorded:
    """Appends messages to a log, and makes them durable.

    Args:
        messages: What to append, in this order.
        store: The log.
        on_progress: Called with the number of messages so far.

    Raises:
        InexactError: A price or a size has more digits than fit; what came before is stored.
        ConfigError: A name of the capture cannot be one of an event, or a code is taken.
        StoreError: The log did not take them.
    """
    register()
    first = end = store.stats().next_sequence
    done = 0
    remaining = iter(messages)
    while batch := list(islice(remaining, _BATCH)):
        events = [event for message in batch for event in compact(message)]
        end = store.append_many(EventBatch(events)).stop
        done += len(batch)
        on_progress(done)
    store.sync()
    return Recorded(done, range(first, end))


_BATCH = 8_192


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


def _units(size: Decimal | None) -> int:
    if size is None:
        return UNKNOWN_SIZE
    units = size.scaleb(8, EXACT)
    if units != int(units) or not 0 <= units < UNKNOWN_SIZE:
        raise InexactError(
            f"the size {size} has more digits than a compact event can hold, which counts in 1e-8"
        )
    return int(units)
