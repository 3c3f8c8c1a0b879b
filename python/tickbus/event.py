"""What a compact event tells and how urgent it is: bytes that behave like integers, with names."""

from __future__ import annotations

import operator
from typing import Any, ClassVar, Self, final

from tickbus import _core
from tickbus.errors import ConfigError

__all__ = ["EventType", "Priority"]

_BYTES = 256


class _Byte(int):
    """An integer from 0 to 255, of which there is one object each."""

    __slots__ = ()

    _objects: ClassVar[list[Any]] = []

    def __new__(cls, value: int) -> Self:
        code = operator.index(value)
        if not 0 <= code < _BYTES:
            raise ConfigError(f"{cls.__name__} was {code}; it must be from 0 to {_BYTES - 1}")
        found: Self = cls._objects[code]
        return found

    def __init_subclass__(cls) -> None:
        cls._objects = [int.__new__(cls, code) for code in range(_BYTES)]

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    __str__ = object.__str__


@final
class EventType(_Byte):
    """What a compact event tells, as a code from 0 to 255.

    Codes 0 to 31 are for markets, 32 to 63 for trading, 64 to 95 for risk, 96 to 127 for the
    system; those from 128 on are critical. Each may have a name, which is the first level of the
    topics of its events; the constants below are always there, `register` names further ones.

    Args:
        value: A code, or the name of one.

    Raises:
        ConfigError: The code is not a byte, or the name is not known.

    Example:
        >>> EventType("price_update")
        EventType.PriceUpdate
        >>> EventType.PriceUpdate.name, EventType.PriceUpdate == 0
        ('price_update', True)
        >>> EventType.EmergencyStop.is_critical
        True
    """

    __slots__ = ()

    PriceUpdate: ClassVar[EventType]
    VolumeSpike: ClassVar[EventType]
    OrderBookImbalance: ClassVar[EventType]
    SpreadWidening: ClassVar[EventType]
    SignalGenerated: ClassVar[EventType]
    OrderPlaced: ClassVar[EventType]
    OrderFilled: ClassVar[EventType]
    OrderCancelled: ClassVar[EventType]
    PositionOpened: ClassVar[EventType]
    PositionClosed: ClassVar[EventType]
    RiskLimitApproached: ClassVar[EventType]
    StopLossTriggered: ClassVar[EventType]
    DrawdownAlert: ClassVar[EventType]
    CorrelationSpike: ClassVar[EventType]
    StrategyStarted: ClassVar[EventType]
    StrategyPaused: ClassVar[EventType]
    SystemOverload: ClassVar[EventType]
    ConnectionLost: ClassVar[EventType]
    ReplayEnded: ClassVar[EventType]
    EmergencyStop: ClassVar[EventType]
    MarketManipulation: ClassVar[EventType]
    BlackSwanDetected: ClassVar[EventType]
    CircuitBreaker: ClassVar[EventType]

    def __new__(cls, value: int | str) -> EventType:
        """Returns the type with this code or name."""
        code = _core._event_type_code(value) if isinstance(value, str) else value
        return super().__new__(cls, code)

    @classmethod
    def register(cls, name: str, code: int) -> EventType:
        """Gives a code a name, for the life of the process, and returns the type.

        Doing it again changes nothing. What comes from other processes brings its names along and
        registers them here.

        Args:
            name: Small letters, digits and underscores, with a letter first.
            code: From 0 to 255, in the range of what it tells.

        Raises:
            ConfigError: The name has another code, the code has another name, or one of them is
                none.
        """
        event_type = cls(operator.index(code))
        _core._register_event_type(name, event_type)
        return event_type

    @classmethod
    def known(cls) -> tuple[EventType, ...]:
        """Returns the types that have names, in the order of their codes."""
        return tuple(found for found in cls._objects if found.name is not None)

    @property
    def name(self) -> str | None:
        """The name, as in topics; `None` if the code was never registered."""
        return _core._event_type_name(self)

    @property
    def is_market(self) -> bool:
        """Whether it tells something about a market: codes 0 to 31."""
        return self < 32

    @property
    def is_trading(self) -> bool:
        """Whether it tells something about orders and positions: codes 32 to 63."""
        return 32 <= self < 64

    @property
    def is_risk(self) -> bool:
        """Whether it tells something about risk: codes 64 to 95."""
        return 64 <= self < 96

    @property
    def is_system(self) -> bool:
        """Whether it tells something about the system: codes 96 to 127."""
        return 96 <= self < 128

    @property
    def is_critical(self) -> bool:
        """Whether it is critical, whatever the priority of the event: codes from 128 on."""
        return self >= 128

    def __repr__(self) -> str:
        constant = _CONSTANTS.get(self)
        if constant is not None:
            return f"EventType.{constant}"
        return f"EventType({int(self) if self.name is None else self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is None:
            raise ConfigError(
                f"event type {int(self)} has no name in this process; register it before it "
                "leaves: codes mean nothing elsewhere"
            )
        return EventType.register, (self.name, int(self))


@final
class Priority(_Byte):
    """How urgent a compact event is among those of its kind: higher is more urgent.

    Args:
        value: From 0 to 127; everything from `Critical` on is as urgent as it. In the bytes of an
            event, 128 more says that a replay published it.

    Raises:
        ConfigError: The value is not a byte.

    Example:
        >>> Priority.Normal < Priority.High < Priority.Critical
        True
    """

    __slots__ = ()

    Normal: ClassVar[Priority]
    High: ClassVar[Priority]
    Critical: ClassVar[Priority]

    def __repr__(self) -> str:
        names = ("Normal", "High", "Critical")
        return f"Priority.{names[self]}" if self < len(names) else f"Priority({int(self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Priority, (int(self),)


_CONSTANTS = {code: name for name, code in _core._built_in_event_types()}
for _code, _name in _CONSTANTS.items():
    setattr(EventType, _name, EventType(_code))
Priority.Normal, Priority.High, Priority.Critical = map(Priority, range(3))

_core._use_codes(EventType._objects, Priority._objects)
