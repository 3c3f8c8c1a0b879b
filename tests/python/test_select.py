"""`select`: whichever of several subscriptions has something first, or a shutdown signal."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import tickbus
from support import MakeBus, assert_sums_closed, read_all, run
from tickbus import Event, EventSystem, Priority


def test_select_gives_a_subscription_that_has_an_event(make_bus: MakeBus) -> None:
    bus = make_bus()
    trades, quotes = bus.subscribe("trades"), bus.subscribe("quotes")
    bus.publish("quote", "quotes")
    assert tickbus.select([trades, quotes]) is quotes
    assert quotes.recv() == "quote"
    bus.publish("trade", "trades")
    assert tickbus.select([trades, quotes]) is trades
    assert read_all(trades) == ["trade"]


def test_select_takes_nothing(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    bus.publish("event")
    for _ in range(3):
        assert tickbus.select([subscription]) is subscription
    assert subscription.pending == 1
    assert_sums_closed(bus)


def test_select_waits_for_the_first_event_of_any(make_bus: MakeBus) -> None:
    bus = make_bus(2_048)
    subscriptions = [bus.subscribe(f"to.{place}") for place in range(3)]
    done = bus.subscribe("done")
    received: list[list[int]] = [[], [], []]
    shutdown = tickbus.Shutdown()

    def read() -> None:
        while (ready := tickbus.select(subscriptions, shutdown)) is not None:
            received[subscriptions.index(ready)].append(ready.recv())
            bus.publish("done", "done")

    reader = threading.Thread(target=read)
    reader.start()
    for event in range(300):
        bus.publish(event, f"to.{event % 3}")
        assert done.recv() == "done"
    shutdown.set()
    reader.join()
    assert received == [list(range(place, 300, 3)) for place in range(3)]
    assert_sums_closed(bus)


def test_a_busy_subscription_does_not_hide_the_others(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscriptions = [bus.subscribe() for _ in range(3)]
    bus.publish("event")
    seen: set[int] = set()
    for _ in range(6):
        ready = tickbus.select(subscriptions)
        assert ready is not None
        seen.add(ready.id)
    assert seen == {subscription.id for subscription in subscriptions}


def test_a_shutdown_signal_ends_the_wait(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    shutdown = tickbus.Shutdown()
    assert not shutdown.is_set()
    started = threading.Event()
    results: list[Any] = []

    def wait() -> None:
        started.set()
        results.append(tickbus.select([subscription], shutdown))

    waiting = threading.Thread(target=wait)
    waiting.start()
    started.wait()
    shutdown.set()
    waiting.join()
    assert results == [None]
    assert shutdown.is_set()
    bus.publish("event")
    assert tickbus.select([subscription], shutdown) is None
    assert read_all(subscription) == ["event"]


def test_a_timeout_ends_the_wait(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    for timeout in (0.0, 0.001):
        assert tickbus.select([subscription], timeout=timeout) is None
    bus.publish("event")
    assert tickbus.select([subscription], timeout=0.0) is subscription


def test_a_closed_subscription_is_ready(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription, other = bus.subscribe(), bus.subscribe()
    started = threading.Event()
    results: list[Any] = []

    def wait() -> None:
        started.set()
        results.append(tickbus.select([subscription, other]))

    waiting = threading.Thread(target=wait)
    waiting.start()
    started.wait()
    other.close()
    waiting.join()
    assert results == [other]
    with pytest.raises(tickbus.Closed):
        other.recv()


def test_select_over_two_buses(make_bus: MakeBus) -> None:
    first, second = make_bus(), make_bus()
    subscriptions = [first.subscribe(), second.subscribe()]
    second.publish("event")
    assert tickbus.select(subscriptions) is subscriptions[1]


def test_select_over_a_bus_and_an_event_system(make_bus: MakeBus) -> None:
    with EventSystem() as system, system.subscribe() as compact:
        bus = make_bus()
        both = [bus.subscribe(), compact]
        assert tickbus.select(both, timeout=0.0) is None
        for event in (Event(0, "price_update"), Event(0, "emergency_stop")):
            system.publish(event)
            assert tickbus.select(both) is compact
            assert compact.recv() == event
        bus.publish("event")
        assert tickbus.select(both) is both[0]
        assert both[0].recv() == "event"
        system.close()
        assert tickbus.select(both) is compact
        with pytest.raises(tickbus.Closed):
            compact.recv()


def test_select_waits_for_a_bus_and_every_lane_of_an_event_system(make_bus: MakeBus) -> None:
    events = [
        Event(0, "price_update", metadata=0),
        Event(0, "price_update", Priority.High, metadata=1),
        Event(0, "emergency_stop", metadata=2),
    ]
    shutdown = tickbus.Shutdown()
    received: list[Any] = []
    bus, answers = make_bus(), make_bus()
    answer = answers.subscribe()
    with EventSystem() as system, system.subscribe() as compact:
        both = [compact, bus.subscribe()]

        def read() -> None:
            while (ready := tickbus.select(both, shutdown)) is not None:
                received.append(ready.recv())
                answers.publish("done")

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(200):
            if number % 4 == 3:
                bus.publish(number)
            else:
                system.publish(events[number % 4])
            assert answer.recv() == "done"
        shutdown.set()
        reader.join()
    wanted = [number if number % 4 == 3 else events[number % 4] for number in range(200)]
    assert received == wanted


def test_what_cannot_be_waited_for_is_refused(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    with pytest.raises(tickbus.ConfigError):
        tickbus.select([])
    for other in (None, "trades", bus, bus.subscribe_async()):
        with pytest.raises(TypeError, match=r"select\(\) waits for what subscribe\(\) returned"):
            tickbus.select([subscription, other])  # type: ignore[type-var]
    for timeout in (-1.0, float("nan"), float("inf")):
        with pytest.raises(tickbus.ConfigError):
            tickbus.select([subscription], timeout=timeout)

    async def main() -> None:
        with pytest.raises(RuntimeError):
            tickbus.select([subscription])

    run(main)
