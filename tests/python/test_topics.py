"""Topics and patterns: `*` is one level, `>` is the rest, and what is unwanted touches nobody."""

from __future__ import annotations

import pytest

import tickbus
from support import Hole, MakeBus, assert_sums_closed, read_all, row_of

TOPICS = (
    None,
    "trades",
    "trades.BTCUSDT",
    "trades.ETHUSDT",
    "trades.binance.BTCUSDT",
    "quotes.BTCUSDT",
)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (None, TOPICS),
        (">", TOPICS[1:]),
        ("*", ("trades",)),
        ("trades", ("trades",)),
        ("trades.*", ("trades.BTCUSDT", "trades.ETHUSDT")),
        ("trades.>", ("trades.BTCUSDT", "trades.ETHUSDT", "trades.binance.BTCUSDT")),
        ("*.BTCUSDT", ("trades.BTCUSDT", "quotes.BTCUSDT")),
        ("trades.*.BTCUSDT", ("trades.binance.BTCUSDT",)),
        ("trades.ETHUSDT", ("trades.ETHUSDT",)),
        ("orders.>", ()),
    ],
)
@pytest.mark.parametrize("known_before", [True, False], ids=["known_topics", "new_topics"])
def test_a_pattern_receives_exactly_what_it_matches(
    make_bus: MakeBus, pattern: str | None, wanted: tuple[str | None, ...], known_before: bool
) -> None:
    bus = make_bus()
    if known_before:
        for topic in TOPICS:
            assert bus.publish(topic or "no topic", topic) == 0
    subscription, also = bus.subscribe(pattern), bus.subscribe_async(pattern)
    for topic in TOPICS:
        assert bus.publish(topic or "no topic", topic) == 2 * (topic in wanted)
    expected = [topic or "no topic" for topic in wanted]
    assert read_all(subscription) == read_all(also) == expected
    assert row_of(bus, subscription).offered == len(wanted)
    assert_sums_closed(bus)


def test_whatever_a_level_is_made_of_it_is_one_level(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    ids = ("BTC-USDT_PERP", "EUR/USD", "ESZ6:XCME", "0x1f", "Ünï", "BRK,B", "@#$%&")
    quotes, all_quotes, of_any_kind = (
        bus.subscribe(pattern) for pattern in ("data.quotes.*", "data.quotes.>", "data.*.0x1f")
    )
    for each in ids:
        assert bus.publish(each, f"data.quotes.{each}") == 2 + (each == "0x1f")
        assert bus.publish("deeper", f"data.quotes.{each}.1m") == 1
    assert read_all(quotes) == list(ids)
    assert read_all(all_quotes) == [event for each in ids for event in (each, "deeper")]
    assert read_all(of_any_kind) == ["0x1f"]


def test_a_topic_object_stands_for_its_name(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe("trades.*")
    topic = bus.topic("trades.BTCUSDT")
    assert topic.name == "trades.BTCUSDT"
    assert bus.publish("by object", topic) == 1
    assert bus.publish("by name", "trades.BTCUSDT") == 1
    assert bus.publish_many(["batch"], topic) == 1
    assert bus.publish_timeout("in time", 1.0, topic) == 1
    assert bus.publish("unwanted", topic=bus.topic("quotes.BTCUSDT")) == 0
    assert read_all(subscription) == ["by object", "by name", "batch", "in time"]


def test_a_topic_of_another_bus_is_refused(make_bus: MakeBus) -> None:
    bus, other = make_bus(), make_bus()
    subscription = bus.subscribe("trades")
    with pytest.raises(tickbus.ConfigError, match="another bus"):
        bus.publish("event", other.topic("trades"))
    assert read_all(subscription) == []
    assert_sums_closed(bus)


@pytest.mark.parametrize("topic", ["", ".", "a.", ".a", "a..b", "a.*", ">", "a.>"])
def test_a_name_that_is_no_topic_is_refused(make_bus: MakeBus, topic: str) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    with pytest.raises(tickbus.ConfigError):
        bus.publish("event", topic)
    with pytest.raises(tickbus.ConfigError):
        bus.topic(topic)
    assert read_all(subscription) == []
    assert bus.metrics().total_published == 0


@pytest.mark.parametrize("pattern", ["", ".", "a.", ".a", "a..b", ">.a", "a.>.b", "a*", "a.b>"])
def test_a_text_that_is_no_pattern_is_refused(make_bus: MakeBus, pattern: str) -> None:
    bus = make_bus()
    with pytest.raises(tickbus.ConfigError):
        bus.subscribe(pattern)
    with pytest.raises(tickbus.ConfigError):
        bus.subscribe_async(pattern)
    assert bus.metrics().subscriber_count == 0


def test_topics_are_a_bounded_vocabulary(make_bus: MakeBus) -> None:
    bus = make_bus(max_topics=3)
    for name in ("a", "b", "c", "a"):
        bus.publish("event", name)
    with pytest.raises(tickbus.ConfigError, match="3"):
        bus.publish("event", "d")
    assert bus.publish("event", "b") == 0


@pytest.mark.parametrize("backend", ["lock_free"], indirect=True)
def test_an_unwanted_topic_never_fills_a_narrow_reader(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    narrow = bus.subscribe("trades.*", policy="reject")
    for event in range(100):
        assert bus.publish(event, "quotes.BTCUSDT") == 0
    assert bus.publish("wanted", "trades.BTCUSDT") == 1
    assert read_all(narrow) == ["wanted"]
    assert row_of(bus, narrow).offered == 1


@pytest.mark.parametrize("backend", ["broadcast"], indirect=True)
def test_on_broadcast_missed_counts_every_overwritten_slot_and_says_so(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    narrow, wide = bus.subscribe("trades.*"), bus.subscribe()
    bus.publish("first", "trades.BTCUSDT")
    for event in range(6):
        assert bus.publish(event, "quotes.BTCUSDT") == 1
    bus.publish("last", "trades.BTCUSDT")
    with pytest.raises(tickbus.Lagged) as caught:
        narrow.try_recv()
    assert (caught.value.missed, caught.value.exact) == (4, False)
    assert read_all(narrow) == ["last"]
    assert read_all(wide) == [Hole(4), 3, 4, 5, "last"]
    assert not row_of(bus, narrow).exact
    assert_sums_closed(bus)


def test_many_patterns_each_receive_their_own(make_bus: MakeBus) -> None:
    bus = make_bus(512)
    subscriptions = [bus.subscribe(f"trades.S{number}") for number in range(100)]
    for _ in range(3):
        for number in range(100):
            assert bus.publish(number, f"trades.S{number}") == 1
    for number, subscription in enumerate(subscriptions):
        received = read_all(subscription)
        assert not any(isinstance(item, Hole) for item in received)
        assert received == [number] * 3
    assert_sums_closed(bus)
