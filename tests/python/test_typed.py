"""A typed bus: each type has its own topics, subscriptions and numbers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tickbus
from support import MakeBus, row_of, run, run_child
from test_events import TYPED_EXAMPLES, TYPES
from tickbus import events
from tickbus.events import Fill, Health, MarketData
from tickbus.typed import TypedEventBus, TypeStats

_TYPING = (Path(__file__).parent / "typing" / "typed_bus.py").read_text(encoding="utf-8")


class Tick(msgspec.Struct, frozen=True):
    """A type of the user."""

    symbol: str
    price: int


def market_data(symbol: str = "BTCUSDT", timestamp: int = 0) -> MarketData:
    one = Decimal(1)
    return MarketData(timestamp, symbol, one, one, one, one, one, one)


@pytest.fixture
def bus(make_bus: MakeBus) -> TypedEventBus:
    """A typed bus on each backend."""
    return TypedEventBus(make_bus())


def test_the_registry_has_the_sixteen_types_by_their_names() -> None:
    assert tuple(TypedEventBus.NAMES) == TYPES
    for event_type, name in TypedEventBus.NAMES.items():
        assert name == events.snake_case(event_type.__name__)


def test_the_methods_are_those_of_the_registry_and_their_types_are_checked() -> None:
    names = list(TypedEventBus.NAMES.values())
    methods = {name for name in vars(TypedEventBus) if name.startswith("subscribe_")}
    assert methods == {"subscribe_async"} | {
        f"subscribe_{name}{kind}" for name in names for kind in ("", "_async")
    }
    checked = re.findall(r"bus\.(subscribe_\w+)\(\),\s+\w*EventSubscription\[events\.", _TYPING)
    assert sorted(checked) == sorted(methods - {"subscribe_async"})


@pytest.mark.parametrize("event", TYPED_EXAMPLES)
def test_each_type_reaches_its_subscribers_in_every_form_and_nobody_else(
    bus: TypedEventBus, event: Any
) -> None:
    name = TypedEventBus.NAMES[type(event)]

    async def main() -> None:
        others = [bus.subscribe(other) for other in TYPES if other is not type(event)]
        in_threads = [bus.subscribe(type(event)), getattr(bus, f"subscribe_{name}")()]
        in_tasks = [bus.subscribe_async(type(event)), getattr(bus, f"subscribe_{name}_async")()]
        raw = bus.bus.subscribe(envelope=True)
        assert bus.publish(event) == 5
        assert [each.try_recv() is event for each in in_threads] == [True, True]
        assert [await each.recv() is event for each in in_tasks] == [True, True]
        enveloped = raw.try_recv()
        symbol = getattr(event, "symbol", None)
        assert enveloped is not None
        assert enveloped.topic == (name if symbol is None else f"{name}.{symbol}")
        assert {row_of(bus.bus, other).offered for other in others} <= {0, 1}
        assert [each.try_recv() for each in others] == [None] * 15

    run(main)


def test_a_symbol_is_filtered_by_the_bus_itself() -> None:
    with TypedEventBus() as bus, bus.subscribe_market_data("ETHUSDT") as ether:
        assert bus.publish(market_data("BTCUSDT")) == 0
        assert bus.publish(market_data("ETHUSDT", 7)) == 1
        assert row_of(bus.bus, ether).offered == 1
        assert ether.recv().timestamp == 7


_symbols = st.text("AB.%*> \n\N{EM SPACE}2E0", min_size=1, max_size=8) | st.text(
    st.characters(codec="utf-8"), min_size=1, max_size=20
)


@given(st.lists(_symbols, unique=True, min_size=2, max_size=6))
def test_each_symbol_has_a_topic_of_its_own_whatever_it_is_made_of(symbols: list[str]) -> None:
    with TypedEventBus(tickbus.LockFreeEventBus(64)) as bus:
        readers = [bus.subscribe(MarketData, symbol) for symbol in symbols]
        everything = bus.subscribe(MarketData)
        for number, symbol in enumerate(symbols):
            assert bus.publish(market_data(symbol, number)) == 2
        for number, reader in enumerate(readers):
            assert [each.timestamp for each in reader.recv_many(9)] == [number]
            reader.close()
        assert [each.symbol for each in everything.recv_many(9)] == symbols
        everything.close()


def test_signs_that_a_topic_cannot_hold_are_escaped(bus: TypedEventBus) -> None:
    raw = bus.bus.subscribe(envelope=True)
    topics = {
        "BRK.B": "BRK.B",
        "A B": "A%20B",
        "A%20B": "A%2520B",
        "*": "%2A",
        ">": "%3E",
        ".": "%2E",
        "..A.": "%2E%2EA%2E",
        "A..B": "A%2E%2EB",
        "A\n": "A%0A",
        "\N{EM SPACE}": "%E2%80%83",
    }
    for symbol in topics:
        bus.publish(market_data(symbol))
    published = [each.topic for each in raw.recv_many(10)]
    assert published == [f"market_data.{topic}" for topic in topics.values()]


@pytest.mark.parametrize("symbol", [None, "", 7])
def test_a_symbol_that_is_no_text_is_refused(bus: TypedEventBus, symbol: Any) -> None:
    with pytest.raises(TypeError, match=r"symbol was .*; it must be a str that is not empty"):
        bus.publish(market_data(symbol))
    assert bus.get_stats()[MarketData].published == 0


def test_a_type_without_a_symbol_cannot_be_filtered_by_one(bus: TypedEventBus) -> None:
    with pytest.raises(tickbus.ConfigError, match=r"symbol was 'BTC'; events of health have none"):
        bus.subscribe(Health, "BTC")


class SubType(MarketData, frozen=True):
    """Not the same type."""


@pytest.mark.parametrize(
    "event", [Tick("A", 1), SubType(0, "A", *[Decimal(1)] * 6), {"symbol": "A"}, None]
)
def test_what_is_not_registered_is_refused_and_the_error_says_what_to_do(
    bus: TypedEventBus, event: Any
) -> None:
    reading = bus.bus.subscribe()
    name = type(event).__name__
    says = rf"{name} is not registered; this bus carries MarketData, .*call register\({name}\)"
    for publish in (bus.publish, lambda event: bus.publish_timeout(event, 1.0), bus.publish_async):
        with pytest.raises(TypeError, match=says):
            publish(event)
    for subscribe in (bus.subscribe, bus.subscribe_async):
        with pytest.raises(TypeError, match=says):
            subscribe(type(event))
    assert reading.try_recv() is None


def test_a_type_of_ones_own_is_carried_like_the_others(bus: TypedEventBus) -> None:
    bus.register(Tick)
    bus.register(Tick)
    ticks, one = bus.subscribe(Tick), bus.subscribe(Tick, "B")
    for symbol in "AB":
        bus.publish(Tick(symbol, 1))
    assert ticks.recv_many(9) == [Tick("A", 1), Tick("B", 1)]
    assert one.recv_many(9) == [Tick("B", 1)]
    assert bus.get_stats()[Tick] == TypeStats(published=2, received=3, dropped=0)


def test_a_registration_on_one_bus_is_none_on_another() -> None:
    with TypedEventBus() as bus, TypedEventBus() as other:
        bus.register(Tick)
        with pytest.raises(TypeError, match="Tick is not registered"):
            other.publish(Tick("A", 1))
    assert Tick not in TypedEventBus.NAMES


class Changing(msgspec.Struct):
    timestamp: int


@pytest.mark.parametrize(
    ("event_type", "name", "error", "says"),
    [
        (dict, None, TypeError, "event_type was <class 'dict'>; it must be a msgspec.Struct class"),
        (Tick("A", 1), None, TypeError, "it must be a msgspec.Struct class"),
        (Changing, None, TypeError, "Changing is not frozen"),
        (Tick, "my.tick", tickbus.ConfigError, "name was 'my.tick'; it must be one level"),
        (Tick, "fill", tickbus.ConfigError, "Tick as 'fill': Fill is registered as 'fill'"),
        (Fill, "mine", tickbus.ConfigError, "Fill as 'mine': Fill is registered as 'fill'"),
    ],
)
def test_a_type_that_cannot_be_carried_is_refused_when_it_is_registered(
    bus: TypedEventBus, event_type: Any, name: str | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        bus.register(event_type, name)


def test_the_options_of_a_subscription_are_those_of_the_bus_below() -> None:
    with TypedEventBus(tickbus.EventBus(keep_last=">")) as bus:
        for number in range(3):
            bus.publish(market_data(timestamp=number))
        with bus.subscribe_market_data(
            capacity=4,
            policy="conflate",
            key=lambda event: event.symbol,
            on_lag="count",
            snapshot=True,
            name="screen",
            envelope=True,
        ) as screen:
            assert (screen.capacity, screen.policy, screen.on_lag) == (4, "conflate", "count")
            assert (screen.name, screen.pattern) == ("screen", "market_data.>")
            envelope = screen.recv()
    assert (envelope.sequence, envelope.event.timestamp) == (2, 2)


def test_all_forms_of_publishing_reach_subscribers_and_count(bus: TypedEventBus) -> None:
    async def main() -> None:
        reading = bus.subscribe_async(MarketData)
        assert bus.publish(market_data(timestamp=1)) == 1
        assert await bus.publish_async(market_data(timestamp=2)) == 1
        assert await asyncio.to_thread(bus.publish_timeout, market_data(timestamp=3), 1.0) == 1
        assert [each.timestamp for each in await reading.recv_many(9)] == [1, 2, 3]
        assert bus.get_stats()[MarketData] == TypeStats(published=3, received=3, dropped=0)

    run(main)


def test_what_nobody_took_over_is_not_counted_as_published() -> None:
    async def main() -> None:
        with TypedEventBus(tickbus.LockFreeEventBus(1)) as bus:
            full = bus.subscribe(MarketData, policy="reject")
            bus.publish(market_data())
            with pytest.raises(tickbus.Full):
                bus.publish(market_data())
            waiting = asyncio.create_task(bus.publish_async(market_data()))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert bus.get_stats()[MarketData] == TypeStats(published=1, received=0, dropped=0)
            full.close()

    run(main)


@pytest.mark.parametrize("end", ["close", "drop", "leave"])
def test_the_numbers_of_a_type_outlive_its_subscriptions(backend: str, end: str) -> None:
    with TypedEventBus(tickbus.EventBus(backend, 4)) as bus:
        everything = bus.subscribe(Health, policy="drop_oldest")
        for _ in range(3):
            gone = bus.subscribe_async(Health, policy="drop_oldest")
            for number in range(6):
                bus.publish(Health(number, "feed", "healthy"))
            with pytest.raises(tickbus.Lagged):
                gone.try_recv()
            assert gone.try_recv() == Health(2, "feed", "healthy")
            if end == "close":
                gone.close()
            elif end == "drop":
                with pytest.warns(ResourceWarning, match="unclosed <AsyncEventSubscription"):
                    del gone
            else:

                async def leave(subscription: Any = gone) -> None:
                    async with subscription:
                        pass

                run(leave)
        gone = None  # type: ignore[assignment]
        everything.close()
        stats = bus.get_stats()
    # Each of the three read 1, missed 2 that were overwritten and 3 that it left behind.
    assert stats[Health].published == 18
    assert (stats[Health].received, stats[Health].dropped) == (3, 15 + 18)
    assert all(row == TypeStats(0, 0, 0) for kind, row in stats.items() if kind is not Health)


def test_numbers_never_step_back_while_subscriptions_come_and_go(bus: TypedEventBus) -> None:
    before = TypeStats(0, 0, 0)
    for number in range(20):
        with bus.subscribe(Health) as reading:
            bus.publish(Health(number, "feed", "healthy"))
            reading.recv()
            bus.publish(Health(number, "feed", "healthy"))
            within = bus.get_stats()[Health]
        after = bus.get_stats()[Health]
        assert (within.received, within.dropped) == (before.received + 1, before.dropped)
        assert (after.received, after.dropped) == (within.received, within.dropped + 1)
        before = after


def test_a_subscription_of_the_bus_below_is_not_counted(bus: TypedEventBus) -> None:
    raw = bus.bus.subscribe("health")
    bus.publish(Health(0, "feed", "healthy"))
    raw.recv()
    assert bus.get_stats()[Health] == TypeStats(published=1, received=0, dropped=0)


def test_closing_it_closes_the_bus_below(bus: TypedEventBus) -> None:
    with bus as same:
        assert same is bus
        assert not bus.closed
        bus.publish(Health(0, "feed", "healthy"))
    assert bus.closed
    assert bus.bus.closed
    with pytest.raises(tickbus.Closed):
        bus.publish(Health(0, "feed", "healthy"))
    assert bus.get_stats()[Health].published == 1
    assert bus.metrics().total_published == 1
    assert "closed" in str(bus.explain())
    assert repr(bus).startswith("<TypedEventBus over <")


def test_a_typed_bus_opens_a_bus_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKBUS_BACKEND", "broadcast")
    with TypedEventBus() as bus:
        assert bus.bus.backend == "broadcast"


def test_a_tally_counts_subscriptions_only() -> None:
    tally = tickbus._core._Tally()
    add: Callable[[Any], None] = tally.add
    with pytest.raises(TypeError, match="it must be what subscribe"):
        add("no subscription")
    assert tally.read() == (0, 0)


def test_a_recorder_is_asked_for_and_there_is_one(bus: TypedEventBus) -> None:
    with pytest.raises(tickbus.ConfigError, match="begin with with_recording"):
        bus.recorder()
    assert bus.with_recording(2) is bus
    with pytest.raises(tickbus.ConfigError, match="records already, its last 2 events"):
        bus.with_recording(3)
    for number in range(3):
        bus.publish(Health(number, "feed", "healthy"))
    bus.close()
    bus.close()
    recorder = bus.recorder()
    assert [each.event.timestamp for each in recorder.get_events()] == [1, 2]
    assert recorder.lost == 1
    assert bus.get_stats()[Health] == TypeStats(published=3, received=0, dropped=0)


def test_a_child_forked_inside_a_with_block_leaves_it_quietly() -> None:
    result = run_child("""
        import os, warnings
        import tickbus
        from tickbus.events import Health
        from tickbus.typed import TypedEventBus

        with TypedEventBus().with_recording(4) as bus:
            bus.publish(Health(0, "feed", "healthy"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                try:
                    bus.publish(Health(1, "feed", "healthy"))
                except tickbus.ForkedError:
                    bus.__exit__(None, None, None)
                    os._exit(0)
                os._exit(1)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status))
        print(len(bus.recorder().get_events()))
    """)
    assert (result.stdout, result.stderr) == ("0\n1\n", "")


def test_a_bus_that_records_nothing_is_closed_like_any_other() -> None:
    bus = TypedEventBus()
    bus.close()
    bus.close()
    with pytest.raises(tickbus.Closed):
        bus.subscribe_market_data()
