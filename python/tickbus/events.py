"""Typed events: frozen structs for what a trading system says, with their units.

They are `msgspec.Struct`s: immutable, compared and hashed by value, picklable, and encoded to JSON
and MessagePack without further ado. The encoded form names its type in the field `event`, so
that a decoder of `AnyEvent` gives back what was encoded:

    >>> import msgspec
    >>> health = Health(1_700_000_000_000_000_000, "feed", "healthy")
    >>> msgspec.json.decode(msgspec.json.encode(health), type=AnyEvent) == health
    True

`timestamp` is the moment at which it happened, in ns since the Unix epoch, UTC, and 0 where that
is unknown. Money and sizes are `decimal.Decimal`, exactly as the venue wrote them; what is measured
or computed as a ratio is a `float`. A struct does not check its arguments, a decoder and a type
checker do. Each type has an alias that ends in `Event`. `tickbus.typed.TypedEventBus` carries them.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal, NamedTuple, TypeAlias

try:
    from msgspec import Struct as Struct
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "tickbus.events needs msgspec; install it with: pip install 'tickbus[events]'",
        name=_missing.name,
    ) from _missing

__all__ = [
    "AggregatedData",
    "AggregatedDataEvent",
    "AnyEvent",
    "ApprovedSignal",
    "ApprovedSignalEvent",
    "BookLevel",
    "Config",
    "ConfigEvent",
    "Error",
    "ErrorEvent",
    "Feature",
    "FeatureEvent",
    "Fill",
    "FillEvent",
    "Health",
    "HealthEvent",
    "MarketData",
    "MarketDataEvent",
    "Metrics",
    "MetricsEvent",
    "Order",
    "OrderBook",
    "OrderBookEvent",
    "OrderEvent",
    "OrderUpdate",
    "OrderUpdateEvent",
    "Performance",
    "PerformanceEvent",
    "Prediction",
    "PredictionEvent",
    "RejectedSignal",
    "RejectedSignalEvent",
    "Side",
    "Signal",
    "SignalEvent",
]

Side: TypeAlias = Literal["buy", "sell"]
"""Which side of a trade one is on."""


def snake_case(name: str) -> str:
    """Returns the name of a class as a level of a topic: `MarketData` becomes `market_data`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


class _Event(Struct, frozen=True, tag=snake_case, tag_field="event"):
    """What all of them have: encoded, they name their type."""


class MarketData(_Event, frozen=True):
    """The last trade of an instrument and the best bid and ask beside it.

    Attributes:
        timestamp: When the venue traded or quoted, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        price: Price of the last trade, in the quote currency for one unit.
        volume: Units of the last trade.
        bid_price: Best bid, in the quote currency for one unit.
        bid_size: Units bid there.
        ask_price: Best ask, in the quote currency for one unit.
        ask_size: Units asked there.
    """

    timestamp: int
    symbol: str
    price: Decimal
    volume: Decimal
    bid_price: Decimal
    bid_size: Decimal
    ask_price: Decimal
    ask_size: Decimal


class AggregatedData(_Event, frozen=True):
    """The trades of an instrument over an interval: a bar.

    Attributes:
        timestamp: The end of the interval, which does not belong to it, in ns since the Unix
            epoch, UTC.
        symbol: The instrument's name.
        start: The beginning of the interval, in ns since the Unix epoch, UTC.
        open: First price, in the quote currency for one unit, like the other prices.
        high: Highest price.
        low: Lowest price.
        close: Last price.
        volume: Units traded.
        vwap: Mean price weighted by units.
        trades: Number of trades.
    """

    timestamp: int
    symbol: str
    start: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    vwap: Decimal
    trades: int


class BookLevel(NamedTuple):
    """A price of an order book: `price` in the quote currency for one unit, `size` in units."""

    price: Decimal
    size: Decimal


class OrderBook(_Event, frozen=True):
    """The best levels of an order book at one moment.

    Attributes:
        timestamp: When the venue saw the book so, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        bids: Levels of the bid side, best (highest) first.
        asks: Levels of the ask side, best (lowest) first.
        update_id: The venue's number of the last change, or `None` where it has none.
    """

    timestamp: int
    symbol: str
    bids: tuple[BookLevel, ...]
    asks: tuple[BookLevel, ...]
    update_id: int | None = None


class Feature(_Event, frozen=True):
    """A number that was computed from market data, for models to use.

    Attributes:
        timestamp: The time of the newest data in it, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        name: The feature's name.
        value: Its value, without a unit or in the one that its name says.
        window: The time that it looks back over, in seconds; 0 looks at one moment.
    """

    timestamp: int
    symbol: str
    name: str
    value: float
    window: float = 0.0


class Signal(_Event, frozen=True):
    """What a strategy would like to trade; the risk check approves or rejects it.

    Attributes:
        timestamp: When the strategy decided, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        signal_id: The signal's name, unique for ever.
        strategy: The strategy's name.
        side: `buy` or `sell`.
        strength: How sure the strategy is, from 0 to 1.
        quantity: Units wanted.
        price: The price that it was decided at, in the quote currency for one unit.
    """

    timestamp: int
    symbol: str
    signal_id: str
    strategy: str
    side: Side
    strength: float
    quantity: Decimal
    price: Decimal


class Prediction(_Event, frozen=True):
    """What a model says about the future of an instrument.

    Attributes:
        timestamp: The time of the newest data that it knew, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        model: The model's name and version.
        target: What is predicted, such as "return".
        value: The prediction; a return is a fraction, so that 0.01 is one percent.
        confidence: How sure the model is, from 0 to 1.
        horizon: How far ahead of `timestamp` it is meant, in seconds.
    """

    timestamp: int
    symbol: str
    model: str
    target: str
    value: float
    confidence: float
    horizon: float


class ApprovedSignal(_Event, frozen=True):
    """A signal that passed the risk check and may become an order.

    Attributes:
        timestamp: When it was approved, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        signal_id: The `signal_id` of the `Signal`.
        strategy: The strategy's name.
        side: `buy` or `sell`.
        quantity: Units approved, at most those wanted.
        price_limit: The worst price allowed, in the quote currency for one unit, or `None`.
    """

    timestamp: int
    symbol: str
    signal_id: str
    strategy: str
    side: Side
    quantity: Decimal
    price_limit: Decimal | None = None


class RejectedSignal(_Event, frozen=True):
    """A signal that did not pass the risk check.

    Attributes:
        timestamp: When it was rejected, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        signal_id: The `signal_id` of the `Signal`.
        strategy: The strategy's name.
        rule: The name of the rule that it broke.
        reason: What was wanted and what was allowed, for people.
    """

    timestamp: int
    symbol: str
    signal_id: str
    strategy: str
    rule: str
    reason: str


class Order(_Event, frozen=True):
    """An order as it is sent to a venue.

    Attributes:
        timestamp: When it was sent, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        order_id: The sender's name of it, unique for ever.
        side: `buy` or `sell`.
        order_type: `market`, `limit`, `stop` or `stop_limit`.
        quantity: Units to trade.
        price: The limit, in the quote currency for one unit; `None` where the type has none.
        stop_price: The trigger, in the quote currency for one unit; `None` where it has none.
        time_in_force: `gtc` (until cancelled), `ioc` (what fits at once), `fok` (all at once or
            nothing) or `day`.
        signal_id: The `signal_id` that it came from, or `None`.
    """

    timestamp: int
    symbol: str
    order_id: str
    side: Side
    order_type: Literal["market", "limit", "stop", "stop_limit"]
    quantity: Decimal
    price: Decimal | None = None
    stop_price: Decimal | None = None
    time_in_force: Literal["gtc", "ioc", "fok", "day"] = "gtc"
    signal_id: str | None = None


class Fill(_Event, frozen=True):
    """A trade of one's own: a part of an order, or all of it, was executed.

    Attributes:
        timestamp: When the venue executed it, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        order_id: The `order_id` of the `Order`.
        fill_id: The venue's name of the execution, unique at that venue.
        side: `buy` or `sell`.
        price: Price, in the quote currency for one unit.
        quantity: Units executed.
        fee: What was paid for it, in `fee_currency`; below 0 where the venue paid.
        fee_currency: The currency of the fee.
        liquidity: `maker` or `taker`, or `None` where the venue does not say.
    """

    timestamp: int
    symbol: str
    order_id: str
    fill_id: str
    side: Side
    price: Decimal
    quantity: Decimal
    fee: Decimal
    fee_currency: str
    liquidity: Literal["maker", "taker"] | None = None


class OrderUpdate(_Event, frozen=True):
    """A change in the life of an order.

    Attributes:
        timestamp: When the venue changed it, in ns since the Unix epoch, UTC.
        symbol: The instrument's name.
        order_id: The `order_id` of the `Order`.
        status: `accepted`, `partially_filled`, `filled`, `cancelled`, `rejected` or `expired`.
        filled_quantity: Units executed so far.
        remaining_quantity: Units that may still be executed.
        average_price: Mean price of what was executed, in the quote currency for one unit, or
            `None` before the first.
        reason: Why, where the venue says so.
    """

    timestamp: int
    symbol: str
    order_id: str
    status: Literal["accepted", "partially_filled", "filled", "cancelled", "rejected", "expired"]
    filled_quantity: Decimal
    remaining_quantity: Decimal
    average_price: Decimal | None = None
    reason: str | None = None


class Metrics(_Event, frozen=True):
    """A number that a component measured about itself.

    Attributes:
        timestamp: When it was measured, in ns since the Unix epoch, UTC.
        component: The component's name.
        name: The metric's name, with its unit as the last word.
        value: Its value.
    """

    timestamp: int
    component: str
    name: str
    value: float


class Performance(_Event, frozen=True):
    """How a strategy stands.

    Attributes:
        timestamp: The moment that it is for, in ns since the Unix epoch, UTC.
        strategy: The strategy's name.
        currency: The currency of all amounts.
        equity: Value of everything it holds.
        realized_pnl: Profit of what was closed, after fees; a loss is below 0.
        unrealized_pnl: Profit of what is open, at the prices of that moment.
        fees: Fees paid so far.
        drawdown: How far equity is below its peak, as a fraction of the peak, from 0 to 1.
        trades: Trades closed so far.
    """

    timestamp: int
    strategy: str
    currency: str
    equity: Decimal
    realized_pnl: Decimal
    unrealized_pnl: Decimal
    fees: Decimal
    drawdown: float
    trades: int


class Config(_Event, frozen=True):
    """A setting that was changed while the system runs.

    Attributes:
        timestamp: When it took effect, in ns since the Unix epoch, UTC.
        component: The component whose setting it is.
        key: The setting's name.
        value: Its value now, as text.
        previous: Its value before, as text, or `None` if it had none.
        changed_by: Who changed it, or `None` where that is not known.
    """

    timestamp: int
    component: str
    key: str
    value: str
    previous: str | None = None
    changed_by: str | None = None


class Health(_Event, frozen=True):
    """How a component feels.

    Attributes:
        timestamp: When it was looked at, in ns since the Unix epoch, UTC.
        component: The component's name.
        status: `healthy`, `degraded` or `unhealthy`.
        latency: How long it took to answer, in seconds, or `None` where nobody asked.
        message: What there is to say, for people.
    """

    timestamp: int
    component: str
    status: Literal["healthy", "degraded", "unhealthy"]
    latency: float | None = None
    message: str = ""


class Error(_Event, frozen=True):
    """Something went wrong in a component.

    Attributes:
        timestamp: When it was noticed, in ns since the Unix epoch, UTC.
        component: The component's name.
        kind: What kind of error it is, such as the name of an exception.
        message: What was wanted, what was found and what to do, for people.
        severity: `warning`, `error` or `critical`.
        recoverable: Whether the component goes on by itself.
    """

    timestamp: int
    component: str
    kind: str
    message: str
    severity: Literal["warning", "error", "critical"] = "error"
    recoverable: bool = True


AnyEvent: TypeAlias = (
    MarketData
    | AggregatedData
    | OrderBook
    | Feature
    | Signal
    | Prediction
    | ApprovedSignal
    | RejectedSignal
    | Order
    | Fill
    | OrderUpdate
    | Metrics
    | Performance
    | Config
    | Health
    | Error
)
"""Any of the sixteen; what a decoder is given to get back what was encoded."""

MarketDataEvent: TypeAlias = MarketData
AggregatedDataEvent: TypeAlias = AggregatedData
OrderBookEvent: TypeAlias = OrderBook
FeatureEvent: TypeAlias = Feature
SignalEvent: TypeAlias = Signal
PredictionEvent: TypeAlias = Prediction
ApprovedSignalEvent: TypeAlias = ApprovedSignal
RejectedSignalEvent: TypeAlias = RejectedSignal
OrderEvent: TypeAlias = Order
FillEvent: TypeAlias = Fill
OrderUpdateEvent: TypeAlias = OrderUpdate
MetricsEvent: TypeAlias = Metrics
PerformanceEvent: TypeAlias = Performance
ConfigEvent: TypeAlias = Config
HealthEvent: TypeAlias = Health
ErrorEvent: TypeAlias = Error
