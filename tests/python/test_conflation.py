"""Conflation: the newest event of each key, and key functions that do what they like."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import pytest

import tickbus
from support import (
    RELEASING_BACKENDS,
    Hole,
    MakeBus,
    assert_sums_closed,
    cancel,
    drops,
    read_all,
    read_to_the_end,
    row_of,
    run,
    spin,
)

releasing = pytest.mark.parametrize("backend", RELEASING_BACKENDS, indirect=True)

Bus = tickbus.EventBus[Any]
Quote = tuple[Hashable, int]


def symbol(quote: Quote) -> Hashable:
    return quote[0]


def publish(bus: Bus, *quotes: Quote) -> None:
    for quote in quotes:
        assert bus.publish(quote) >= 1


def test_the_newest_event_of_each_key_is_read_in_the_order_of_becoming_pending(
    make_bus: MakeBus,
) -> None:
    bus = make_bus()
    subscription = bus.subscribe(policy="conflate", key=symbol)
    assert subscription.policy == "conflate"
    publish(bus, ("ETH", 1), ("BTC", 1), ("ETH", 2), ("SOL", 1), ("BTC", 2), ("ETH", 3))
    assert subscription.pending == 3
    assert subscription.try_recv() == ("ETH", 3)
    publish(bus, ("ETH", 4), ("BTC", 3))
    assert read_all(subscription) == [("BTC", 3), ("SOL", 1), ("ETH", 4)]
    row = row_of(bus, subscription)
    assert (row.offered, row.delivered, row.dropped) == (8, 4, drops(conflated=4))
    assert_sums_closed(bus)


def test_without_a_function_the_key_is_the_topic_and_no_topic_is_one_key(
    make_bus: MakeBus,
) -> None:
    bus = make_bus()
    everything = bus.subscribe(policy="conflate")
    quotes = bus.subscribe("quotes.*", policy="conflate")
    for number in range(3):
        for topic in ("quotes.BTC", "quotes.ETH", "trades.BTC", None):
            bus.publish((topic, number), topic)
    assert read_all(quotes) == [("quotes.BTC", 2), ("quotes.ETH", 2)]
    assert [topic for topic, _ in read_all(everything)] == [
        "quotes.BTC",
        "quotes.ETH",
        "trades.BTC",
        None,
    ]
    row = row_of(bus, quotes)
    assert (row.offered, row.dropped, row.exact) == (6, drops(conflated=4), True)
    assert_sums_closed(bus)


def test_the_oldest_key_makes_way_and_is_told_at_its_place(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe(capacity=2, policy="conflate", key=symbol)
    publish(bus, ("A", 1), ("B", 1), ("A", 2), ("C", 1), ("D", 1))
    with pytest.raises(tickbus.Lagged) as caught:
        subscription.recv_many(9)
    assert (caught.value.missed, caught.value.exact) == (2, True)
    assert subscription.try_recv() == ("C", 1)
    publish(bus, ("E", 1), ("F", 1), ("E", 2))
    bus.close()
    assert read_to_the_end(subscription) == [Hole(1), ("E", 2), ("F", 1)]
    assert row_of(bus, subscription).dropped == drops(conflated=2, overwritten=3)
    assert_sums_closed(bus)


def test_its_capacity_is_its_own_on_both_backends(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    assert bus.subscribe(capacity=100, policy="conflate").capacity == 128
    assert bus.subscribe(policy="conflate").capacity == 4


def test_closing_counts_what_is_pending(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe(policy="conflate", key=symbol)
    publish(bus, ("A", 1), ("B", 1), ("A", 2))
    subscription.close()
    with pytest.raises(tickbus.Closed):
        subscription.try_recv()
    assert bus.metrics().total_dropped == 3
    assert bus.publish(("A", 3)) == 0


@pytest.mark.parametrize(
    "keys",
    [
        ("text", "te" + "xt!"[:2]),
        (1, 1.0),
        (("venue", "BTC"), ("venue", "BTC")),
        (frozenset({1, 2}), frozenset({2, 1})),
        (None, None),
    ],
    ids=repr,
)
def test_equal_keys_are_one_key(make_bus: MakeBus, keys: tuple[Hashable, Hashable]) -> None:
    bus = make_bus()
    subscription = bus.subscribe(policy="conflate", key=symbol)
    publish(bus, (keys[0], 1), ("another", 1), (keys[1], 2))
    assert [number for _, number in read_all(subscription)] == [2, 1]


def test_keys_of_one_hash_are_told_apart_by_comparing(make_bus: MakeBus) -> None:
    class Same:
        def __init__(self, name: str) -> None:
            self.name = name

        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Same) and other.name == self.name

    bus = make_bus()
    subscription = bus.subscribe(policy="conflate", key=lambda event: Same(event[0]))
    for number in range(3):
        publish(bus, *((name, number) for name in "abcde"))
    assert read_all(subscription) == [(name, 2) for name in "abcde"]


@pytest.mark.parametrize("policy", [None, "drop_oldest"])
def test_a_key_with_another_policy_is_refused(make_bus: MakeBus, policy: str | None) -> None:
    bus = make_bus()
    for subscribe in (bus.subscribe, bus.subscribe_async):
        with pytest.raises(tickbus.ConfigError, match="ask for policy conflate"):
            subscribe(policy=policy, key=symbol)
        with pytest.raises(TypeError, match="must be a function"):
            subscribe(policy="conflate", key="symbol")
    assert bus.metrics().subscriber_count == 0


class BadHash:
    def __hash__(self) -> int:
        raise ArithmeticError("no hash")


class BadEqual:
    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError("no comparison")


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (lambda event: 1 // event[1], ZeroDivisionError),
        (lambda event: [] if event[1] == 0 else event[0], TypeError),
        (lambda event: BadHash() if event[1] == 0 else event[0], ArithmeticError),
        (lambda event: BadEqual(), ArithmeticError),
    ],
    ids=["function", "unhashable", "hash", "equality"],
)
def test_what_a_key_raises_publish_raises_and_nobody_has_the_event(
    make_bus: MakeBus, key: Callable[[Any], Hashable], error: type[Exception]
) -> None:
    bus = make_bus(keep_last=">")
    before = bus.subscribe(policy="conflate", key=symbol)
    failing = bus.subscribe(policy="conflate", key=key)
    after = bus.subscribe()
    publish(bus, ("BTC", 1))
    calls: tuple[Callable[[], object], ...] = (
        lambda: bus.publish(("BTC", 0), "quotes"),
        lambda: bus.publish_timeout(("BTC", 0), 1.0, "quotes"),
        lambda: run(lambda: bus.publish_async(("BTC", 0), "quotes")),
    )
    for call in calls:
        with pytest.raises(error):
            call()
    assert bus.last("quotes") is None
    assert bus.metrics().total_published == 1
    for subscription in (before, failing, after):
        assert read_all(subscription) == [("BTC", 1)]
    assert_sums_closed(bus)


def test_a_batch_that_a_key_ends_says_how_many_were_accepted(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe(policy="conflate", key=lambda event: 1 // event[1])
    with pytest.raises(ZeroDivisionError) as caught:
        bus.publish_many([("A", 1), ("B", 2), ("C", 0), ("D", 3)])
    assert caught.value.accepted == 2  # type: ignore[attr-defined]
    assert read_all(subscription) == [("A", 1), ("B", 2)]


def test_a_key_function_sees_only_wanted_events_and_each_once(make_bus: MakeBus) -> None:
    bus = make_bus()
    seen: list[object] = []
    subscription = bus.subscribe(
        "quotes.*", policy="conflate", key=lambda event: seen.append(event)
    )
    bus.publish("unwanted", "trades.BTC")
    bus.publish("without a topic")
    bus.publish("wanted", "quotes.BTC")
    assert seen == read_all(subscription) == ["wanted"]


def test_key_functions_hashes_and_comparisons_may_use_the_bus(make_bus: MakeBus) -> None:
    bus = make_bus(64)
    plain = bus.subscribe()
    late: list[tickbus.EventSubscription[Any]] = []

    class Talking:
        def __hash__(self) -> int:
            bus.publish("from a hash", "log")
            return 1

        def __eq__(self, other: object) -> bool:
            bus.publish("from a comparison", "log")
            return True

    def key(event: str) -> Hashable:
        if event == "subscribe":
            late.append(bus.subscribe("quotes.*", policy="conflate", key=len))
        elif event == "leave":
            late.pop().close()
        elif event == "close":
            bus.close()
        return Talking()

    subscription = bus.subscribe("quotes.*", policy="conflate", key=key)
    assert bus.publish("first", "quotes.BTC") == 2
    assert bus.publish("subscribe", "quotes.BTC") == 3, "who joined meanwhile has it too"
    assert read_all(late[0]) == ["subscribe"]
    assert bus.publish("leave", "quotes.BTC") == 2
    with pytest.raises(tickbus.Closed):
        bus.publish("close", "quotes.BTC")
    assert read_all(subscription) == ["leave"]
    received = read_all(plain)
    assert [event for event in received if not event.startswith("from")] == [
        "first",
        "subscribe",
        "leave",
    ]
    assert received.count("from a hash") == 3
    assert received.count("from a comparison") >= 2
    assert_sums_closed(bus)


@releasing
def test_distinct_keys_are_not_bounded_and_those_out_of_use_are_released(
    make_bus: MakeBus,
) -> None:
    bus = make_bus()
    subscription = bus.subscribe(capacity=4, policy="conflate", key=symbol)

    class Name:
        """A key that can be watched."""

    watched: list[weakref.ref[Name]] = []
    for number in range(2_000):
        name = Name()
        watched.append(weakref.ref(name))
        publish(bus, (name, number))
        del name
        assert len(read_all(subscription)) == 1
    gc.collect()
    assert sum(name() is not None for name in watched) <= 256
    subscription.close()
    gc.collect()
    assert not any(name() is not None for name in watched)


def test_the_function_is_released_when_the_subscription_is_closed(make_bus: MakeBus) -> None:
    bus = make_bus()

    class Key:
        def __call__(self, event: object) -> object:
            return event

    watched = []
    for end in ("close", "bus"):
        key = Key()
        watched.append(weakref.ref(key))
        subscription = bus.subscribe(policy="conflate", key=key)
        del key
        bus.publish("event")
        assert watched[-1]() is not None
        if end == "close":
            subscription.close()
            assert watched[-1]() is None
    with pytest.raises(tickbus.ConfigError):
        bus.subscribe(policy="block", key=(refused := Key()))
    watched[0] = weakref.ref(refused)
    del refused
    gc.collect()
    assert watched[0]() is None


@pytest.mark.parametrize("reader", ["subscribe", "subscribe_async"])
def test_cycles_through_pending_events_keys_and_functions_are_collected(
    backend: str, reader: str
) -> None:
    class Payload:
        def __init__(self, links: list[object]) -> None:
            self.links = links

    def key_that_sees(*links: object) -> Callable[[Any], Hashable]:
        return lambda event: (event, links)[0]

    bus: Bus = tickbus.EventBus(backend, 4, keep_last=">")
    subscription = getattr(bus, reader)(policy="conflate", key=key_that_sees(bus))
    payload = Payload([bus, subscription])
    bus.publish(payload)
    bus.publish(payload, "quotes.BTC")
    watched, watched_bus = weakref.ref(payload), weakref.ref(bus)
    bus.close()
    del bus, subscription, payload
    gc.collect()
    assert watched() is None
    assert watched_bus() is None


@releasing
def test_replaced_events_are_released_at_once_and_may_publish(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe(policy="conflate")

    class Talking:
        def __del__(self) -> None:
            bus.publish("from the destructor", "log")

    bus.publish(Talking())
    assert subscription.pending == 1
    bus.publish("newer")
    assert read_all(subscription) == ["newer", "from the destructor"]
    assert_sums_closed(bus)


def test_tasks_are_woken_and_a_cancelled_recv_loses_nothing(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async(policy="conflate", key=symbol)

    async def main() -> None:
        for number in range(50):
            first = asyncio.create_task(subscription.recv())
            second = asyncio.create_task(subscription.recv())
            await spin()
            publish(bus, ("A", number), ("A", -number))
            assert await cancel(first) or first.result() == ("A", -number)
            if first.cancelled():
                assert await second == ("A", -number)
            await cancel(second)
        publish(bus, ("A", 1), ("B", 1), ("A", 2))
        bus.close()
        assert [event async for event in subscription] == [("A", 2), ("B", 1)]

    asyncio.run(main())
    assert_sums_closed(bus)


@pytest.mark.parametrize("by_tasks", [False, True], ids=["threads", "tasks"])
def test_under_threads_no_key_goes_backwards_and_the_last_of_each_arrives(
    make_bus: MakeBus, by_tasks: bool
) -> None:
    publishers, keys, rounds = 3, 4, 1_500
    bus = make_bus()
    arguments: dict[str, Any] = {"capacity": 16, "policy": "conflate", "key": symbol}
    received: list[Any] = []

    def produce(publisher: int) -> None:
        for number in range(rounds):
            for key in range(keys):
                assert bus.publish((f"{publisher} {key}", number)) == 1

    def produce_all() -> None:
        threads = [threading.Thread(target=produce, args=(p,)) for p in range(publishers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bus.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        producing = threading.Thread(target=produce_all)
        if by_tasks:
            tasks = bus.subscribe_async(**arguments)
            subscription: Any = tasks

            async def read() -> None:
                async for event in tasks:
                    received.append(event)

            producing.start()
            asyncio.run(read())
        else:
            subscription = bus.subscribe(**arguments)
            producing.start()
            received += read_to_the_end(subscription)
        producing.join()
    finally:
        sys.setswitchinterval(interval)
    newest: dict[str, int] = {}
    for key, number in received:
        assert number > newest.get(key, -1)
        newest[key] = number
    assert list(newest.values()) == [rounds - 1] * publishers * keys
    row = row_of(bus, subscription)
    assert row.offered == publishers * keys * rounds
    assert row.delivered == len(received)
    assert row.dropped == drops(conflated=row.offered - len(received))
    assert_sums_closed(bus)


def test_select_sees_a_subscription_that_conflates(make_bus: MakeBus) -> None:
    bus = make_bus()
    quotes = bus.subscribe("quotes.*", policy="conflate")
    trades = bus.subscribe("trades.*")
    assert tickbus.select([quotes, trades], timeout=0.0) is None
    bus.publish("quote", "quotes.BTC")
    assert tickbus.select([trades, quotes]) is quotes
