"""Typed events: immutable values that survive every way out of the process and back."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any, get_args

import msgspec
import pytest

from support import run_child
from test_readme import EXAMPLES
from tickbus import events

TYPES: tuple[type[Any], ...] = get_args(events.AnyEvent)


def _examples() -> list[Any]:
    """Returns the examples that the documentation shows."""
    (code,) = [each.values[0] for each in EXAMPLES if str(each.id).startswith("docs/events.md")]
    shown: dict[str, Any] = {}
    exec(str(code), shown)
    return list(shown["examples"])


TYPED_EXAMPLES = [pytest.param(event, id=type(event).__name__) for event in _examples()]

_WAYS: dict[str, Callable[[Any], Any]] = {
    "json": lambda event: msgspec.json.decode(msgspec.json.encode(event), type=events.AnyEvent),
    "msgpack": lambda event: msgspec.msgpack.decode(
        msgspec.msgpack.encode(event), type=events.AnyEvent
    ),
    "pickle": lambda event: pickle.loads(pickle.dumps(event)),
    "copy": copy.deepcopy,
}


def _parts(value: Any) -> list[Any]:
    """Returns what a value is made of, with types, as deep as it goes."""
    if isinstance(value, tuple):
        return [type(value), *(_parts(each) for each in value)]
    return [type(value), value, str(value)]


def test_each_of_the_sixteen_types_has_an_example() -> None:
    assert len(TYPES) == 16
    assert [type(each.values[0]) for each in TYPED_EXAMPLES] == list(TYPES)


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("event", TYPED_EXAMPLES)
def test_an_event_comes_back_as_it_was(event: Any, way: str) -> None:
    back = _WAYS[way](event)
    assert type(back) is type(event)
    assert back == event
    assert hash(back) == hash(event)
    # Equal is not enough for money: 35412.0 == Decimal("35412.00").
    for name in event.__struct_fields__:
        assert _parts(getattr(back, name)) == _parts(getattr(event, name))


@pytest.mark.parametrize("event", TYPED_EXAMPLES)
def test_an_event_cannot_be_changed(event: Any) -> None:
    with pytest.raises(AttributeError, match="immutable"):
        event.timestamp = 0


@pytest.mark.parametrize("event", TYPED_EXAMPLES)
def test_the_garbage_collector_need_not_walk_over_an_event(event: Any) -> None:
    import gc

    parts = [getattr(event, name) for name in event.__struct_fields__]
    # From CPython 3.13 on decimals are tracked themselves.
    assert gc.is_tracked(event) == any(map(gc.is_tracked, parts))


@pytest.mark.parametrize("event_type", TYPES)
def test_each_type_begins_with_its_time_and_its_alias_ends_in_event(event_type: type[Any]) -> None:
    assert event_type.__struct_fields__[0] == "timestamp"
    assert getattr(events, f"{event_type.__name__}Event") is event_type


@pytest.mark.parametrize("event_type", TYPES)
def test_every_field_is_documented(event_type: type[Any]) -> None:
    # CPython 3.13 takes the indentation away.
    documentation = inspect.cleandoc(event_type.__doc__ or "")
    _, _, attributes = documentation.partition("Attributes:\n")
    for name in event_type.__struct_fields__:
        assert f"\n    {name}: " in f"\n{attributes}", name


def test_market_data_has_the_fields_that_were_asked_for_in_their_order() -> None:
    assert events.MarketData.__struct_fields__ == (
        "timestamp",
        "symbol",
        "price",
        "volume",
        "bid_price",
        "bid_size",
        "ask_price",
        "ask_size",
    )


def test_a_decoder_keeps_each_digit_of_a_price_and_refuses_what_is_none() -> None:
    encoded = msgspec.json.encode(TYPED_EXAMPLES[0].values[0])
    digits = b"0.1000000000000000000000000000001"
    precise = msgspec.json.decode(encoded.replace(b"35412.10", digits), type=events.AnyEvent)
    assert isinstance(precise, events.MarketData)
    assert precise.price == Decimal(digits.decode())
    with pytest.raises(msgspec.ValidationError, match="price"):
        msgspec.json.decode(encoded.replace(b"35412.10", b"cheap"), type=events.AnyEvent)


def test_a_level_of_a_topic_is_a_class_name_in_snake_case() -> None:
    names = ["MarketData", "Order", "HTTPError", "L2Book", "MyFIXMessage"]
    assert [events.snake_case(name) for name in names] == [
        "market_data",
        "order",
        "http_error",
        "l2_book",
        "my_fix_message",
    ]


def test_without_msgspec_the_error_names_the_extra_and_the_bus_works() -> None:
    result = run_child("""
        import sys
        sys.modules["msgspec"] = None
        import tickbus
        tickbus.EventBus().close()
        try:
            import tickbus.events
        except ModuleNotFoundError as error:
            print(error.name, error)
    """)
    assert result.stdout == (
        "msgspec tickbus.events needs msgspec; install it with: pip install 'tickbus[events]'\n"
    ), result.stderr


def test_importing_tickbus_does_not_import_msgspec() -> None:
    script = "import sys, tickbus; sys.exit('msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
