"""Event types and priorities: bytes that behave like integers, with names."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import tickbus
from tickbus import EventType, Priority

CODES = {
    "PriceUpdate": 0,
    "VolumeSpike": 1,
    "OrderBookImbalance": 2,
    "SpreadWidening": 3,
    "SignalGenerated": 32,
    "OrderPlaced": 33,
    "OrderFilled": 34,
    "OrderCancelled": 35,
    "PositionOpened": 36,
    "PositionClosed": 37,
    "RiskLimitApproached": 64,
    "StopLossTriggered": 65,
    "DrawdownAlert": 66,
    "CorrelationSpike": 67,
    "StrategyStarted": 96,
    "StrategyPaused": 97,
    "SystemOverload": 98,
    "ConnectionLost": 99,
    "ReplayEnded": 100,
    "EmergencyStop": 128,
    "MarketManipulation": 129,
    "BlackSwanDetected": 130,
    "CircuitBreaker": 131,
}


def test_the_codes_are_those_that_were_promised() -> None:
    declared = [name for name in EventType.__annotations__ if name[0].isupper()]
    assert declared == list(CODES)
    assert {name: getattr(EventType, name) for name in declared} == CODES
    assert set(CODES.values()) <= set(EventType.known())


def test_a_type_is_an_integer_with_a_name() -> None:
    price: Any = EventType.PriceUpdate
    assert isinstance(price, int)
    assert (price, hash(price), price + 1, [5, 6][price]) == (0, 0, 1, 5)
    assert {price: "found"}[0] == "found"
    assert (price.name, repr(price), str(price)) == ("price_update", *["EventType.PriceUpdate"] * 2)
    assert EventType.EmergencyStop > EventType.ConnectionLost


def test_there_is_one_object_for_each_code() -> None:
    for code in range(256):
        assert EventType(code) is EventType(code)
        assert Priority(code) is Priority(code)
        assert EventType(code) == Priority(code) == code
    assert EventType("order_filled") is EventType.OrderFilled
    assert tickbus.Event(0, 34).event_type is EventType.OrderFilled
    assert tickbus.Event(0, 0, 1).priority is Priority.High


@pytest.mark.parametrize("each", [EventType.CircuitBreaker, EventType(252), Priority.High])
def test_a_copy_is_the_object(each: EventType | Priority) -> None:
    assert copy.copy(each) is copy.deepcopy(each) is each


def test_pickling_gives_the_object() -> None:
    EventType.register("funding_rate", 10)
    for each in (EventType.OrderFilled, EventType(10), Priority.Critical, Priority(9)):
        assert pickle.loads(pickle.dumps(each)) is each
    with pytest.raises(tickbus.ConfigError, match="event type 252 has no name"):
        pickle.dumps(EventType(252))


def test_a_type_shows_what_makes_it_again() -> None:
    EventType.register("funding_rate", 10)
    for code in range(256):
        for each in (EventType(code), Priority(code)):
            assert eval(repr(each)) is each
    assert repr(EventType(10)) == "EventType('funding_rate')"
    assert [repr(Priority(code)) for code in (0, 2, 3)] == [
        "Priority.Normal",
        "Priority.Critical",
        "Priority(3)",
    ]


@pytest.mark.parametrize("wrong", [-1, 256])
@pytest.mark.parametrize("make", [EventType, Priority])
def test_what_is_no_byte_is_refused(make: Any, wrong: int) -> None:
    with pytest.raises(tickbus.ConfigError, match=f"was {wrong}; it must be from 0 to 255"):
        make(wrong)
    with pytest.raises(TypeError):
        make(1.5)


def test_every_code_is_in_exactly_one_range() -> None:
    for code in range(256):
        each = EventType(code)
        ranges = [
            each.is_market,
            each.is_trading,
            each.is_risk,
            each.is_system,
            each.is_critical,
        ]
        assert ranges == [place == min(code // 32, 4) for place in range(5)]


def test_a_registered_name_is_known_everywhere_and_registering_again_changes_nothing() -> None:
    registered = EventType.register("basis_change", 11)
    assert registered is EventType(11) is EventType("basis_change")
    assert EventType.register("basis_change", 11) is registered
    assert registered.name == "basis_change"
    assert registered in EventType.known()
    assert tickbus.Event(0, "basis_change", symbol="BTC").topic == "basis_change.BTC"
    assert [*EventType.known()] == sorted(EventType.known())


def test_conflicts_are_refused_both_ways() -> None:
    EventType.register("basis_change", 11)
    with pytest.raises(tickbus.ConfigError, match='"basis_change" was to be code 13, but it is 11'):
        EventType.register("basis_change", 13)
    with pytest.raises(
        tickbus.ConfigError, match='11 was to be named "other", but it is "basis_ch'
    ):
        EventType.register("other", 11)
    with pytest.raises(tickbus.ConfigError, match="emergency_stop"):
        EventType.register("my_emergency", 128)
    assert EventType(13).name is None
    with pytest.raises(tickbus.ConfigError, match='event type was "other"; it must be one of'):
        EventType("other")


@pytest.mark.parametrize("name", ["", "Price", "a.b", "a-b", "a b", "_a", "1a", "ä", "x" * 128])
def test_a_name_that_is_no_level_of_a_topic_is_refused(name: str) -> None:
    with pytest.raises(tickbus.ConfigError, match="event type"):
        EventType.register(name, 251)
    assert EventType(251).name is None
