"""The last event of each topic: read without subscribing, and given to who joins late."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

import tickbus
from support import (
    RELEASING_BACKENDS,
    Hole,
    MakeBus,
    assert_sums_closed,
    drops,
    read_all,
    read_to_the_end,
    row_of,
)

releasing = pytest.mark.parametrize("backend", RELEASING_BACKENDS, indirect=True)


def test_the_last_event_of_a_topic_is_readable_without_subscribing(make_bus: MakeBus) -> None:
    bus = make_bus(keep_last=">")
    assert bus.last("quotes.BTC") is None
    for number in range(3):
        assert bus.publish(("BTC", number), "quotes.BTC") == 0
        assert bus.publish(("ETH", number), bus.topic("quotes.ETH")) == 0
        assert bus.publish("without a topic") == 0
    assert bus.last("quotes.BTC") == bus.last(bus.topic("quotes.BTC")) == ("BTC", 2)
    assert bus.last("quotes.ETH") == ("ETH", 2)
    bus.close()
    assert bus.last("quotes.BTC") == ("BTC", 2), "also after the end"


def test_asking_for_an_unknown_topic_uses_none_of_the_vocabulary(make_bus: MakeBus) -> None:
    bus = make_bus(keep_last=">", max_topics=1)
    for number in range(100):
        assert bus.last(f"quotes.{number}") is None
    assert bus.publish("event", "quotes.BTC") == 0
    assert bus.last("quotes.BTC") == "event"


def test_what_is_not_kept_is_an_error_that_says_what_to_do(make_bus: MakeBus) -> None:
    nothing, quotes = make_bus(), make_bus(keep_last="quotes.*")
    with pytest.raises(tickbus.ConfigError, match="keep_last"):
        nothing.last("quotes.BTC")
    with pytest.raises(tickbus.ConfigError, match="keep_last"):
        nothing.subscribe(snapshot=True)
    with pytest.raises(tickbus.ConfigError, match=r"quotes\.\*"):
        quotes.last("trades.BTC")
    for no_topic in ("quotes.*", "", "a..b"):
        with pytest.raises(tickbus.ConfigError):
            quotes.last(no_topic)
    with pytest.raises(tickbus.ConfigError, match="another bus"):
        quotes.last(nothing.topic("quotes.BTC"))
    with pytest.raises(TypeError):
        quotes.last(1)  # type: ignore[arg-type]
    with pytest.raises(tickbus.ConfigError, match="wildcard"):
        make_bus(keep_last="quotes*")


def test_an_event_that_nobody_has_is_not_the_last(backend: str) -> None:
    with tickbus.LockFreeEventBus[int](keep_last=">") as bus:
        subscription = bus.subscribe(capacity=1, policy="reject")
        assert bus.publish(1, "quotes") == 1
        with pytest.raises(tickbus.Full):
            bus.publish(2, "quotes")
        assert bus.last("quotes") == 1
        subscription.close()


@pytest.mark.parametrize("policy", ["drop_oldest", "conflate"])
def test_a_snapshot_comes_first_and_live_events_go_on_where_it_ends(
    make_bus: MakeBus, policy: str
) -> None:
    bus = make_bus(2, keep_last="quotes.*")
    for event, topic in enumerate(["quotes.ETH", "quotes.BTC", "quotes.SOL", "trades.BTC"]):
        bus.publish(event, topic)
    bus.publish(4, "quotes.ETH")
    snapshot: Any = {"policy": policy, "snapshot": True}
    everything, btc = bus.subscribe(**snapshot), bus.subscribe("*.BTC", **snapshot)
    plain = bus.subscribe(policy=policy)
    assert (everything.pending, btc.pending, plain.pending) == (3, 1, 0)
    bus.publish(5, "quotes.BTC")
    assert_sums_closed(bus)
    assert read_all(everything) == [1, 2, 4, 5]
    assert read_all(btc) == [1, 5]
    assert read_all(plain) == [5]
    assert (row_of(bus, everything).offered, row_of(bus, everything).delivered) == (4, 4)
    assert_sums_closed(bus)


def test_a_snapshot_takes_no_room_and_a_hole_comes_behind_it(make_bus: MakeBus) -> None:
    bus = make_bus(2, keep_last=">")
    for event, topic in enumerate(["a", "b", "c"]):
        bus.publish(event, topic)
    subscription = bus.subscribe(policy="drop_oldest", snapshot=True)
    for event in (3, 4, 5):
        bus.publish(event, "a")
    assert subscription.pending == 5
    assert subscription.recv_many(9)[:3] == [0, 1, 2]
    assert_sums_closed(bus)
    assert read_all(subscription) == [Hole(1), 4, 5]
    assert row_of(bus, subscription).dropped == drops(overwritten=1)
    assert_sums_closed(bus)


def test_tasks_begin_with_a_snapshot_too(make_bus: MakeBus) -> None:
    bus = make_bus(keep_last=">")
    bus.publish("kept", "quotes.BTC")
    subscription = bus.subscribe_async(snapshot=True)

    async def main() -> list[str]:
        bus.publish("live", "quotes.BTC")
        bus.close()
        return [event async for event in subscription]

    assert asyncio.run(main()) == ["kept", "live"]


def test_leaving_counts_the_rest_of_a_snapshot_as_closed(make_bus: MakeBus) -> None:
    bus = make_bus(keep_last=">")
    for event, topic in enumerate(["a", "b", "c"]):
        bus.publish(event, topic)
    subscription = bus.subscribe(snapshot=True)
    assert subscription.recv() == 0
    subscription.close()
    assert bus.metrics().total_dropped == 2


@releasing
def test_events_that_are_no_longer_the_last_are_released(backend: str) -> None:
    class Payload:
        """An event that can be watched."""

    bus: tickbus.EventBus[Payload] = tickbus.EventBus(backend, 4, keep_last=">")
    watched = []
    for _ in range(100):
        payload = Payload()
        watched.append(weakref.ref(payload))
        bus.publish(payload, "quotes.BTC")
        del payload
    assert [reference() is not None for reference in watched] == [False] * 99 + [True]
    bus.close()
    del bus
    gc.collect()
    assert watched[-1]() is None


def test_who_joins_while_others_publish_sees_no_gap_and_no_step_backwards(
    make_bus: MakeBus,
) -> None:
    topics = [f"quotes.{number}" for number in range(3)]
    joins = 50
    last = 40 * joins
    bus = make_bus(16_384, keep_last=">")
    turn = threading.Semaphore(0)

    def produce() -> None:
        for number in range(1, last + 1):
            turn.acquire()
            for topic in topics:
                bus.publish((topic, number), topic)
        bus.close()

    for topic in topics:
        bus.publish((topic, 0), topic)
    producer = threading.Thread(target=produce)
    subscriptions: list[tuple[dict[str, int], tickbus.EventSubscription[Any]]] = []
    producer.start()
    for _ in range(joins):
        turn.release(last // joins)
        before = {topic: bus.last(topic)[1] for topic in topics}
        subscriptions.append((before, bus.subscribe(snapshot=True)))
        # The last turn is kept back until everybody has joined.
        if len(subscriptions) == 1:
            assert turn.acquire()
    turn.release()
    producer.join()
    for before, subscription in subscriptions:
        seen: dict[str, int] = {}
        for topic, number in read_to_the_end(subscription):
            if topic in seen:
                assert number == seen[topic] + 1
            else:
                assert number >= before[topic]
            seen[topic] = number
        assert seen == dict.fromkeys(topics, last)
    assert_sums_closed(bus)
