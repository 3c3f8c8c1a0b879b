"""The compact event: its fields, its bytes, its names, and what becomes of them elsewhere."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import struct
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tickbus
from tickbus import Event, EventType, Priority

NOON = 1_767_268_800_000_000_001
FIELDS = ("timestamp", "event_type", "priority", "source_id", "symbol", "value", "metadata")
# Little-endian, without padding.
LAYOUT = "<QBBHIdQ"
BYTES = st.binary(min_size=32, max_size=32)


def _event(**changes: Any) -> Event:
    fields: dict[str, Any] = {
        "timestamp": NOON,
        "event_type": EventType.PriceUpdate,
        "priority": Priority.High,
        "source_id": "binance",
        "symbol": "BTCUSDT",
        "value": 61_000.5,
        "metadata": 7,
    }
    return Event(**(fields | changes))


def _in_another_process(code: str, stdin: bytes) -> bytes:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], input=stdin, capture_output=True, timeout=60
    )
    assert (result.returncode, result.stderr.decode()) == (0, "")
    return result.stdout


def test_an_event_has_the_fields_that_it_was_made_of() -> None:
    by_position = Event(NOON, EventType.OrderFilled, Priority.Critical, "kraken", "ETHUSD", 2.5, 9)
    event = Event(
        metadata=9,
        value=2.5,
        symbol="ETHUSD",
        source_id="kraken",
        priority=2,
        event_type="order_filled",
        timestamp=NOON,
    )
    assert event == by_position
    assert (event.timestamp, event.event_type, event.priority) == (NOON, 34, 2)
    assert (event.source, event.symbol) == ("kraken", "ETHUSD")
    assert event.source_id == tickbus.sources.find("kraken")
    assert event.symbol_id == tickbus.symbols.find("ETHUSD")
    assert (event.value, event.metadata) == (2.5, 9)
    assert type(event.event_type) is EventType
    assert type(event.priority) is Priority


def test_what_is_left_out_is_normal_zero_or_nothing() -> None:
    event = Event(0, 0)
    assert (event.priority, event.source_id, event.symbol_id) == (Priority.Normal, 0, 0)
    assert (event.source, event.symbol, event.value, event.metadata) == (None, None, 0.0, 0)
    assert event.to_bytes() == bytes(32)
    signature = inspect.signature(Event)
    assert tuple(signature.parameters) == FIELDS
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert Event(0, 0, **defaults) == event


def test_names_and_numbers_mean_the_same() -> None:
    by_name = Event(1, "price_update", 0, "binance", "BTCUSDT")
    symbol, source = tickbus.symbols.intern("BTCUSDT"), tickbus.sources.intern("binance")
    assert Event(1, EventType.PriceUpdate, Priority.Normal, source, symbol) == by_name
    assert Event(1, 0, 0, source, symbol) == by_name
    assert Event(1, 0, source_id=None, symbol=None) == Event(1, 0)


def test_what_behaves_like_an_integer_or_a_number_is_taken() -> None:
    class Index:
        def __index__(self) -> int:
            return 5

    number: Any = Decimal("1.5")
    index: Any = Index()
    assert Event(index, index, index, index, index, number, index) == Event(5, 5, 5, 5, 5, 1.5, 5)
    assert Event(True, 0, value=-1).value == -1.0


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"timestamp": -1}, OverflowError, "timestamp was -1; it must be from 0 to 18446744073"),
        ({"timestamp": 1 << 64}, OverflowError, "timestamp was 18446744073709551616"),
        ({"metadata": 1 << 64}, OverflowError, "metadata was"),
        ({"timestamp": 1.5}, TypeError, "timestamp was 1.5; it must be an integer"),
        ({"event_type": 256}, OverflowError, "event_type was 256; it must be from 0 to 255"),
        ({"event_type": None}, TypeError, "event_type was None; it must be a name or an integer"),
        ({"event_type": "PriceUpdate"}, tickbus.ConfigError, "register"),
        ({"priority": 256}, OverflowError, "priority was 256; it must be from 0 to 255"),
        ({"priority": "High"}, TypeError, "priority was 'High'; it must be an integer"),
        ({"source_id": 1 << 16}, OverflowError, "source_id was 65536; it must be from 0 to 65535"),
        ({"source_id": 1.0}, TypeError, "source_id was 1.0; it must be a name or an integer"),
        ({"symbol": 1 << 32}, OverflowError, "symbol was 4294967296; it must be from 0"),
        ({"symbol": b"BTC"}, TypeError, "symbol was b'BTC'; it must be a name or an integer"),
        ({"symbol": ""}, tickbus.ConfigError, 'symbol was ""; every level'),
        ({"symbol": "BTC USDT"}, tickbus.ConfigError, "spaces"),
        ({"source_id": "*"}, tickbus.ConfigError, "wildcards"),
        ({"symbol": "x" * 128}, tickbus.ConfigError, "symbol had 128 bytes; it must have at most"),
        ({"value": "1.5"}, TypeError, "value was '1.5'; it must be a number"),
        ({"value": 10**400}, OverflowError, "float"),
        ({"price": 1.0}, TypeError, 'has no field "price"; its fields are timestamp, '),
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_refused(
    wrong: dict[str, Any], error: type[Exception], text: str
) -> None:
    for make in (_event, _event().replace):
        with pytest.raises(error) as caught:
            make(**wrong)
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), {}),
        ((1,), {}),
        ((), {"event_type": 1}),
        ((1, 2), {"timestamp": 1}),
        ((1, 2, 3, 4, 5, 6, 7, 8), {}),
    ],
)
def test_arguments_that_are_missing_or_too_many_are_refused(
    arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=r"event|twice"):
        Event(*arguments, **named)


def test_both_ways_to_make_an_event_are_one() -> None:
    # The first is what calling the class does quickly, the other what subclasses would use.
    arguments: Any = (NOON, 3, 1, "binance")
    named: Any = {"value": 2.0, "symbol": "BTCUSDT"}
    assert Event.__new__(Event, *arguments, **named) == Event(*arguments, **named)
    for wrong in ({"x": 1}, {"timestamp": 1}):
        with pytest.raises(TypeError, match=r"no field|twice"):
            Event.__new__(Event, *arguments, **wrong)
    # A name that was put together is not the object that stands in code.
    assert Event(1, 2, **{"".join(["val", "ue"]): 3.0}).value == 3.0


def test_an_event_is_final_and_frozen() -> None:
    event: Any = _event()
    for field in (*FIELDS, "source", "symbol_id", "anything"):
        with pytest.raises(AttributeError):
            setattr(event, field, 1)
    with pytest.raises(TypeError):
        type("Sub", (Event,), {})


def test_events_are_no_work_for_the_garbage_collector() -> None:
    events = [_event(metadata=number) for number in range(1_000)]
    again = [*map(Event.from_bytes, map(bytes, events)), *(each.replace() for each in events)]
    assert not any(map(gc.is_tracked, [*events, *again]))
    del again
    for _ in range(10):
        assert [Event(NOON, 0, metadata=n).metadata for n in range(200)] == [*range(200)]
    gc.collect()
    assert [event.metadata for event in events] == [*range(1_000)]


@given(BYTES)
def test_any_32_bytes_are_an_event_and_come_back(data: bytes) -> None:
    event = Event.from_bytes(data)
    assert event.to_bytes() == bytes(event) == data
    timestamp, event_type, priority, source_id, symbol, _, metadata = struct.unpack(LAYOUT, data)
    read = (event.timestamp, event.event_type, event.priority, event.source_id, event.symbol_id)
    assert read == (timestamp, event_type, priority & 127, source_id, symbol)
    assert event.replayed == (priority >= 128)
    assert (struct.pack("<d", event.value), event.metadata) == (data[16:24], metadata)


@given(BYTES, BYTES)
def test_events_are_equal_if_their_bytes_are_and_hash_alike(one: bytes, other: bytes) -> None:
    event = Event.from_bytes(one)
    assert event == Event.from_bytes(one)
    assert hash(event) == hash(Event.from_bytes(one))
    assert (event == Event.from_bytes(other)) == (one == other)
    assert event != one
    assert len({event, Event.from_bytes(one), Event.from_bytes(other)}) == len({one, other})


def test_a_nan_equals_itself_and_zeros_of_two_signs_differ() -> None:
    assert _event(value=float("nan")) == _event(value=float("nan"))
    assert _event(value=0.0) != _event(value=-0.0)


def test_hashes_of_like_events_differ() -> None:
    events = {_event(timestamp=t, metadata=m) for t in range(100) for m in range(100)}
    assert len({hash(event) for event in events}) == len(events) == 10_000


@pytest.mark.parametrize("size", [0, 31, 33])
def test_other_than_32_bytes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"data had {size} bytes; an event has 32"):
        Event.from_bytes(bytes(size))


@given(BYTES)
@example(bytes(16) + struct.pack("<d", float("inf")) + bytes(8))
@example(bytes(16) + struct.pack("<d", float("-inf")) + bytes(8))
@example(bytes(16) + struct.pack("<d", float("nan")) + bytes(8))
def test_what_an_event_shows_makes_it_again(data: bytes) -> None:
    event = Event.from_bytes(data)
    again = eval(repr(event), {"Event": Event, "EventType": EventType, "Priority": Priority})
    if event.value == event.value:
        assert again == event
    else:  # text has one NaN
        assert again.value != again.value
        assert again.replace(value=0.0) == event.replace(value=0.0)


def test_what_an_event_shows_has_names() -> None:
    assert repr(_event()) == (
        f"Event(timestamp={NOON}, event_type=EventType.PriceUpdate, priority=Priority.High, "
        "source_id='binance', symbol='BTCUSDT', value=61000.5, metadata=7)"
    )
    assert "source_id=0, symbol=None" in repr(Event(0, 0))


def test_a_replayed_event_shows_its_priority_and_that_it_was_replayed() -> None:
    live, replayed = Event(1, 0, Priority.High), Event(1, 0, Priority.High | 128)
    assert repr(replayed) == repr(live).replace("Priority.High,", "Priority.High | 128,")
    assert str(replayed) == repr(replayed) != repr(live)
    assert (replayed.priority, replayed.lane) == (live.priority, live.lane)
    assert replayed != live
    assert replayed.replace(priority=replayed.priority) == live


def test_replacing_changes_the_given_fields_only() -> None:
    event = _event()
    changed = event.replace(value=1.0, symbol="ETHUSDT")
    assert (changed.value, changed.symbol) == (1.0, "ETHUSDT")
    assert changed.replace(value=event.value, symbol=event.symbol) == event
    assert event.replace() == event
    assert event.replace(symbol=None).symbol is None
    if sys.version_info >= (3, 13):
        assert copy.replace(event, value=1.0) == event.replace(value=1.0)
    assert event.__replace__(value=1.0) == event.replace(value=1.0)


def test_a_copy_of_an_event_is_the_event() -> None:
    event = _event()
    assert copy.copy(event) is event
    assert copy.deepcopy([event])[0] is event


def test_events_are_matched_by_position_and_by_name() -> None:
    match _event():
        case Event(timestamp, EventType.PriceUpdate, symbol="BTCUSDT", value=value):
            assert (timestamp, value) == (NOON, 61_000.5)
        case _:
            pytest.fail("it did not match")
    assert Event.__match_args__ == FIELDS


@pytest.mark.parametrize(
    ("event_type", "priority", "lane"),
    [
        (0, 0, "normal"),
        (127, 0, "normal"),
        (127, 1, "high"),
        (127, 2, "critical"),
        (127, 127, "critical"),
        (127, 128 + 1, "high"),
        (128, 0, "critical"),
        (255, 1, "critical"),
    ],
)
def test_a_critical_type_outweighs_the_priority(event_type: int, priority: int, lane: str) -> None:
    assert Event(0, event_type, priority).lane == lane


def test_the_topic_is_made_of_the_names_of_type_and_symbol() -> None:
    assert _event().topic == "price_update.BTCUSDT"
    assert _event(symbol=None).topic == "price_update"
    assert _event(event_type=254).topic is None
    assert _event(symbol=(1 << 32) - 1).topic is None


# Protocol 0 writes floats as text, which has one NaN.
@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_every_bit(protocol: int) -> None:
    events = [
        _event(),
        Event(0, 131),
        _event(value=struct.unpack("<d", b"\1\2\3\4\5\6\xf8\xff")[0]),
    ]
    assert pickle.loads(pickle.dumps(events, protocol)) == events


def test_a_pickled_event_takes_its_names_to_a_process_with_other_numbers() -> None:
    EventType.register("liquidity_gap", 20)
    events = [_event(), _event(event_type="liquidity_gap", symbol="SOLUSDT", source_id=None)]
    code = """if True:
        import pickle, sys, tickbus
        for name in ("A", "B", "C"):
            tickbus.symbols.intern(name)
            tickbus.sources.intern(name)
        for event in pickle.load(sys.stdin.buffer):
            print(event.symbol_id, event.source_id, event.topic, event.source)
    """
    shown = _in_another_process(code, pickle.dumps(events)).decode().splitlines()
    assert shown == [
        "4 4 price_update.BTCUSDT binance",
        "5 0 liquidity_gap.SOLUSDT None",
    ]


def test_a_pickled_type_that_means_something_else_there_is_refused() -> None:
    EventType.register("liquidity_gap", 20)
    code = """if True:
        import pickle, sys, tickbus
        tickbus.EventType.register("something_else", 20)
        try:
            pickle.load(sys.stdin.buffer)
        except tickbus.ConfigError as error:
            print(error)
    """
    shown = _in_another_process(code, pickle.dumps(_event(event_type="liquidity_gap")))
    assert b'event type 20 was to be named "liquidity_gap", but it is "something_else"' in shown


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"event_type": 253}, "event type 253 has no name"),
        ({"symbol": (1 << 32) - 1}, "symbol was 4294967295, which has no name"),
        ({"source_id": (1 << 16) - 1}, "source_id was 65535, which has no name"),
    ],
)
def test_a_number_without_a_name_does_not_leave_the_process(
    change: dict[str, int], text: str
) -> None:
    with pytest.raises(tickbus.ConfigError, match=text):
        pickle.dumps(_event(**change))


@pytest.mark.parametrize("names", [tickbus.symbols, tickbus.sources], ids=["symbols", "sources"])
def test_a_table_of_names_knows_them_both_ways(names: Any) -> None:
    before = len(names)
    added = [names.intern(f"NAME{number}") for number in range(300)]
    assert added == [*range(before + 1, before + 301)]
    assert [names.intern(f"NAME{number}") for number in range(300)] == added
    assert [names.name(id) for id in added] == [f"NAME{number}" for number in range(300)]
    assert len(names) == before + 300
    assert "NAME7" in names
    assert "NAME300" not in names
    assert 7 not in names
    assert (names.find("NAME7"), names.find("NAME300")) == (added[7], None)
    assert f"{len(names)} s" in repr(names)


@pytest.mark.parametrize("id", [0, 1 << 31])
def test_a_number_that_is_not_known_has_no_name(id: int) -> None:
    with pytest.raises(tickbus.ConfigError, match=f"id was {id}; it must be that of a known symb"):
        tickbus.symbols.name(id)


def test_a_full_table_says_so_and_goes_on_knowing_its_names() -> None:
    code = """if True:
        import tickbus
        for number in range(1, 65_536):
            assert tickbus.sources.intern(f"S{number}") == number
        try:
            tickbus.Event(0, 0, source_id="one_more")
        except tickbus.ConfigError as error:
            print(error)
        print(tickbus.Event(0, 0, source_id="S65535").source, len(tickbus.sources))
    """
    refused, kept = _in_another_process(code, b"").decode().splitlines()
    assert refused.startswith('source "one_more" would be number 65536; a process knows at most')
    assert kept == "S65535 65535"
