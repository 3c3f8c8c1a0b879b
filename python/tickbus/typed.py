"""A bus for typed events: subscribing by type, native filtering by symbol, numbers by type.

```
publish(MarketData(...)) ─► topic market_data.BTCUSDT ─┬─► subscribe(MarketData, "BTCUSDT")
                                                       └─► subscribe(MarketData): market_data.>
```
Each type has a name, the first level of its topics; events with a symbol have that behind it.
So the bus itself knows who wants what, and no subscription ever filters in Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from tickbus._core import _Tally
from tickbus.bus import EventBus
from tickbus.errors import ConfigError
from tickbus.events import (
    AggregatedData,
    ApprovedSignal,
    Config,
    Error,
    Feature,
    Fill,
    Health,
    MarketData,
    Metrics,
    Order,
    OrderBook,
    OrderUpdate,
    Performance,
    Prediction,
    RejectedSignal,
    Signal,
    Struct,
    snake_case,
)
from tickbus.recorder import EventRecorder

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Self

    from tickbus._core import AsyncEventSubscription, EventSubscription, Topic
    from tickbus._metrics import EventBusMetrics, Explanation
    from tickbus.envelope import Envelope

__all__ = ["SubscribeOptions", "TypeStats", "TypedEventBus"]

E = TypeVar("E", bound=Struct)


class SubscribeOptions(TypedDict, Generic[E], total=False):
    """What `subscribe` takes beside the type and the symbol; `EventBus.subscribe` explains it."""

    capacity: int | None
    policy: Literal["block", "reject", "drop_newest", "drop_oldest", "conflate"] | None
    on_lag: Literal["raise", "count"]
    key: Callable[[E], Hashable] | None
    snapshot: bool
    name: str | None


@dataclass(frozen=True, slots=True)
class TypeStats:
    """The numbers of one type of events.

    Attributes:
        published: Events published, wanted or not.
        received: Events read by its subscriptions, each counted where it was read.
        dropped: Events that a subscription of it wanted and did not get, for any reason.
    """

    published: int
    received: int
    dropped: int


class _Route:
    """Where the events of one type go."""

    __slots__ = ("_bus", "has_symbol", "name", "tally", "topics")

    def __init__(self, bus: EventBus[Any], event_type: type[Struct], name: str) -> None:
        self._bus = bus
        self.name = name
        self.has_symbol = "symbol" in event_type.__struct_fields__
        self.tally = _Tally()
        self.topics: dict[Any, Topic] = {}
        """By symbol, and by `None` where the type has none."""

    def learn(self, symbol: object) -> Topic:
        """Returns the topic of a symbol that is not among `topics` yet."""
        name = f"{self.name}.{_levels(symbol)}" if self.has_symbol else self.name
        topic = self.topics[symbol] = self._bus.topic(name)
        return topic

    def pattern(self, symbol: str | None) -> str:
        """Returns the topics of a symbol, or of all."""
        if self.has_symbol:
            return f"{self.name}.{'>' if symbol is None else _levels(symbol)}"
        if symbol is not None:
            raise ConfigError(
                f"symbol was {symbol!r}; events of {self.name} have none: leave it out"
            )
        return self.name


# What a topic cannot hold: its own signs, dots with nothing between them, spaces and controls. And
# the sign of what replaces them, so that what was replaced can be told from what was not.
_NO_PART_OF_A_TOPIC = re.compile(r"[*>%\s\x00-\x1f\x7f-\x9f]|(?:\A|(?<=\.))\.|\.(?=\.|\Z)")


def _levels(symbol: object) -> str:
    """Returns a symbol as levels of a topic; different symbols give different ones."""
    if not isinstance(symbol, str) or not symbol:
        raise TypeError(f"symbol was {symbol!r}; it must be a str that is not empty")
    return _NO_PART_OF_A_TOPIC.sub(
        lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), symbol
    )


class _Subscribe(Protocol[E]):
    """`subscribe` with its type given."""

    @overload
    def __call__(
        self,
        symbol: str | None = None,
        *,
        envelope: Literal[False] = False,
        **options: Unpack[SubscribeOptions[E]],
    ) -> EventSubscription[E]: ...
    @overload
    def __call__(
        self,
        symbol: str | None = None,
        *,
        envelope: Literal[True],
        **options: Unpack[SubscribeOptions[E]],
    ) -> EventSubscription[Envelope[E]]: ...


class _SubscribeAsync(Protocol[E]):
    """`subscribe_async` with its type given."""

    @overload
    def __call__(
        self,
        symbol: str | None = None,
        *,
        envelope: Literal[False] = False,
        **options: Unpack[SubscribeOptions[E]],
    ) -> AsyncEventSubscription[E]: ...
    @overload
    def __call__(
        self,
        symbol: str | None = None,
        *,
        envelope: Literal[True],
        **options: Unpack[SubscribeOptions[E]],
    ) -> AsyncEventSubscription[Envelope[E]]: ...


class _For(Generic[E]):
    """Makes a method `subscribe_<name>` for one type, and the name the type's."""

    def __init__(self, event_type: type[E]) -> None:
        self.event_type = event_type

    def __set_name__(self, owner: type[TypedEventBus], name: str) -> None:
        owner.NAMES[self.event_type] = name.removeprefix("subscribe_")
        self.__doc__ = f"As `subscribe({self.event_type.__name__}, ...)`."

    def __get__(self, bus: TypedEventBus, owner: type[TypedEventBus]) -> _Subscribe[E]:
        return cast("_Subscribe[E]", partial(bus.subscribe, self.event_type))


class _ForAsync(Generic[E]):
    """Makes a method `subscribe_<name>_async` for one type."""

    def __init__(self, event_type: type[E]) -> None:
        self.event_type = event_type
        self.__doc__ = f"As `subscribe_async({event_type.__name__}, ...)`."

    def __get__(self, bus: TypedEventBus, owner: type[TypedEventBus]) -> _SubscribeAsync[E]:
        return cast("_SubscribeAsync[E]", partial(bus.subscribe_async, self.event_type))


class TypedEventBus:
    """Carries typed events over any bus, and knows each type by its name.

    The methods `subscribe_market_data()`, `subscribe_market_data_async()` and so on are
    `subscribe(MarketData)` and `subscribe_async(MarketData)`. The bus below can be used beside it:
    the events of a type are on the topics `<name>.<symbol>`, or `<name>` where it has no symbol.
    A sign that a topic cannot hold is written as in addresses of web pages: the events of `BTC USD`
    are on `market_data.BTC%20USD`.

    Args:
        bus: What carries the events; `None` opens `EventBus()`. Closing this closes it.

    Example:
        >>> from tickbus.events import Health
        >>> with TypedEventBus() as bus, bus.subscribe_health() as health:
        ...     bus.publish(Health(1_700_000_000_000_000_000, "feed", "healthy"))
        ...     health.recv().status
        1
        'healthy'
    """

    NAMES: ClassVar[dict[type[Struct], str]] = {}
    """The types that every typed bus knows, with their names."""

    subscribe_market_data = _For(MarketData)
    subscribe_aggregated_data = _For(AggregatedData)
    subscribe_order_book = _For(OrderBook)
    subscribe_feature = _For(Feature)
    subscribe_signal = _For(Signal)
    subscribe_prediction = _For(Prediction)
    subscribe_approved_signal = _For(ApprovedSignal)
    subscribe_rejected_signal = _For(RejectedSignal)
    subscribe_order = _For(Order)
    subscribe_fill = _For(Fill)
    subscribe_order_update = _For(OrderUpdate)
    subscribe_metrics = _For(Metrics)
    subscribe_performance = _For(Performance)
    subscribe_config = _For(Config)
    subscribe_health = _For(Health)
    subscribe_error = _For(Error)

    subscribe_market_data_async = _ForAsync(MarketData)
    subscribe_aggregated_data_async = _ForAsync(AggregatedData)
    subscribe_order_book_async = _ForAsync(OrderBook)
    subscribe_feature_async = _ForAsync(Feature)
    subscribe_signal_async = _ForAsync(Signal)
    subscribe_prediction_async = _ForAsync(Prediction)
    subscribe_approved_signal_async = _ForAsync(ApprovedSignal)
    subscribe_rejected_signal_async = _ForAsync(RejectedSignal)
    subscribe_order_async = _ForAsync(Order)
    subscribe_fill_async = _ForAsync(Fill)
    subscribe_order_update_async = _ForAsync(OrderUpdate)
    subscribe_metrics_async = _ForAsync(Metrics)
    subscribe_performance_async = _ForAsync(Performance)
    subscribe_config_async = _ForAsync(Config)
    subscribe_health_async = _ForAsync(Health)
    subscribe_error_async = _ForAsync(Error)

    def __init__(self, bus: EventBus[Any] | None = None) -> None:
        self._bus: EventBus[Any] = EventBus() if bus is None else bus
        self._publish = self._bus.publish
        self._routes: dict[type[Any], _Route] = {}
        self._recorder: EventRecorder | None = None
        for event_type, name in self.NAMES.items():
            self.register(event_type, name)

    @property
    def bus(self) -> EventBus[Any]:
        """The bus that carries the events."""
        return self._bus

    @property
    def closed(self) -> bool:
        """Whether the bus was closed."""
        return self._bus.closed

    def register(self, event_type: type[Struct], name: str | None = None) -> None:
        """Lets the bus carry a type of one's own. Again does nothing.

        Args:
            event_type: A frozen `msgspec.Struct`; a field `symbol`, where it has one, is a str.
            name: The first level of its topics; `None` is the class name in snake case.

        Raises:
            TypeError: It is no frozen struct.
            ConfigError: The name is not one level of a topic, or belongs to another type.
        """
        if not (isinstance(event_type, type) and issubclass(event_type, Struct)):
            raise TypeError(f"event_type was {event_type!r}; it must be a msgspec.Struct class")
        if not event_type.__struct_config__.frozen:
            raise TypeError(
                f"{event_type.__name__} is not frozen; several readers share each event, so "
                "declare the class with frozen=True"
            )
        name = snake_case(event_type.__name__) if name is None else name
        if _levels(name) != name or "." in name:
            raise ConfigError(f"name was {name!r}; it must be one level of a topic, as in my_tick")
        for other, route in self._routes.items():
            if other is event_type and route.name == name:
                return
            if other is event_type or route.name == name:
                raise ConfigError(
                    f"{event_type.__name__} as {name!r}: {other.__name__} is registered as "
                    f"{route.name!r}; a type has one name and a name one type"
                )
        self._routes[event_type] = _Route(self._bus, event_type, name)

    def publish(self, event: Struct) -> int:
        """Publishes an event and returns how many subscriptions took it, as `EventBus.publish`.

        Raises:
            TypeError: The type of the event is not registered; nobody has the event.
        """
        route = self._routes.get(type(event))
        if route is None:
            raise self._unregistered(type(event))
        symbol = event.symbol if route.has_symbol else None  # type: ignore[attr-defined]
        return self._publish(event, route.topics.get(symbol) or route.learn(symbol))

    def publish_timeout(self, event: Struct, timeout: float) -> int:
        """As `publish`, with a patience of its own in seconds: see `EventBus.publish_timeout`."""
        return self._bus.publish_timeout(event, timeout, self._topic(event))

    def publish_async(self, event: Struct) -> Coroutine[object, None, int]:
        """As `publish`, awaiting its turn while the loop runs: see `EventBus.publish_async`."""
        return self._bus.publish_async(event, self._topic(event))

    @overload
    def subscribe(
        self,
        event_type: type[E],
        symbol: str | None = None,
        *,
        envelope: Literal[False] = False,
        **options: Unpack[SubscribeOptions[E]],
    ) -> EventSubscription[E]: ...
    @overload
    def subscribe(
        self,
        event_type: type[E],
        symbol: str | None = None,
        *,
        envelope: Literal[True],
        **options: Unpack[SubscribeOptions[E]],
    ) -> EventSubscription[Envelope[E]]: ...
    def subscribe(
        self,
        event_type: type[E],
        symbol: str | None = None,
        *,
        envelope: bool = False,
        **options: Unpack[SubscribeOptions[E]],
    ) -> EventSubscription[Any]:
        """Returns a subscription to the events of a type, read by threads.

        Args:
            event_type: The type.
            symbol: The only symbol wanted; `None` wants all.
            envelope: Whether it gives `tickbus.Envelope`s: number, topic and time beside the event.
            **options: Those of `EventBus.subscribe`.

        Raises:
            TypeError: The type is not registered.
            ConfigError: The type has no symbol, or the backend cannot keep what was asked for.
            Closed: The bus is closed.
        """
        route = self._route(event_type)
        pattern = route.pattern(symbol)
        subscription: EventSubscription[Any]
        subscription = self._bus.subscribe(pattern, envelope=envelope, **options)  # type: ignore[call-overload]
        route.tally.add(subscription)
        return subscription

    @overload
    def subscribe_async(
        self,
        event_type: type[E],
        symbol: str | None = None,
        *,
        envelope: Literal[False] = False,
        **options: Unpack[SubscribeOptions[E]],
    ) -> AsyncEventSubscription[E]: ...
    @overload
    def subscribe_async(
        self,
        event_type: type[E],
        symbol: str | None = None,
        *,
        envelope: Literal[True],
        **options: Unpack[SubscribeOptions[E]],
    ) -> AsyncEventSubscription[Envelope[E]]: ...
    def subscribe_async(
        self,
        event_type: type[E],
        symbol: str | None = None,
        *,
        envelope: bool = False,
        **options: Unpack[SubscribeOptions[E]],
    ) -> AsyncEventSubscription[Any]:
        """Returns a subscription read by tasks; the arguments and errors are `subscribe`'s."""
        route = self._route(event_type)
        pattern = route.pattern(symbol)
        subscription: AsyncEventSubscription[Any]
        subscription = self._bus.subscribe_async(pattern, envelope=envelope, **options)  # type: ignore[call-overload]
        route.tally.add(subscription)
        return subscription

    def get_stats(self) -> dict[type[Struct], TypeStats]:
        """Returns the numbers of every registered type since the bus was made.

        They are read from the bus and from the subscriptions that this bus made, also those that
        are closed; publishing and reading do nothing for them that they do not do anyway.
        """
        return {
            event_type: TypeStats(self._bus._published_below(route.name), *route.tally.read())
            for event_type, route in self._routes.items()
        }

    def with_recording(self, n: int) -> Self:
        """Begins to keep the last `n` events, and returns the bus.

        Raises:
            ConfigError: It records already, `n` is out of range, or larger than a `broadcast` bus.
            Closed: The bus is closed.
        """
        if self._recorder is not None:
            raise ConfigError(
                f"this bus records already, its last {self._recorder.capacity} events"
            )
        self._recorder = EventRecorder(self._bus, n)
        return self

    def recorder(self) -> EventRecorder:
        """Returns what `with_recording` keeps.

        Raises:
            ConfigError: It was not called.
        """
        if self._recorder is None:
            raise ConfigError("this bus records nothing; begin with with_recording(n)")
        return self._recorder

    def metrics(self) -> EventBusMetrics:
        """Returns the counters of the bus, as `EventBus.metrics`."""
        return self._bus.metrics()

    def explain(self) -> Explanation:
        """Returns who stops publishers now, as `EventBus.explain`."""
        return self._bus.explain()

    def close(self) -> None:
        """Ends publishing and recording; readers first read what is pending. Again does nothing."""
        self._bus.close()
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> Self:
        self._bus.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self._bus.__exit__(exc_type, exc_value, traceback)
        if self._recorder is not None:
            self._recorder.__exit__(exc_type, exc_value, traceback)

    def __repr__(self) -> str:
        return f"<TypedEventBus over {self._bus!r}>"

    def _topic(self, event: Struct) -> Topic:
        route = self._route(type(event))
        symbol = event.symbol if route.has_symbol else None  # type: ignore[attr-defined]
        return route.topics.get(symbol) or route.learn(symbol)

    def _route(self, event_type: type[Any]) -> _Route:
        try:
            return self._routes[event_type]
        except KeyError:
            raise self._unregistered(event_type) from None

    def _unregistered(self, event_type: object) -> TypeError:
        name = getattr(event_type, "__name__", repr(event_type))
        known = ", ".join(known.__name__ for known in self._routes)
        return TypeError(
            f"{name} is not registered; this bus carries {known}: call register({name}) first if "
            "it is a frozen msgspec.Struct"
        )
