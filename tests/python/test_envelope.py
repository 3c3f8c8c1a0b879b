"""Envelopes: each event with its number, topic and time, for those who ask for them."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sys
import threading
import time
import weakref
from typing import Any

import pytest

import tickbus
from support import PATIENCE_WITHOUT_END, MakeBus, run
from tickbus import Envelope
from tickbus.anyio import EventReceiveStream


class Steps:
    """A clock that goes on by one in each call."""

    def __init__(self, now: int = 1_000) -> None:
        self.now = now

    def time_ns(self) -> int:
        self.now += 1
        return self.now


def test_an_envelope_has_number_topic_time_and_event(make_bus: MakeBus) -> None:
    bus = make_bus(clock=Steps())
    enveloped, plain = bus.subscribe(envelope=True), bus.subscribe()
    bus.publish("a", "letters.a")
    bus.publish("b")
    expected = [Envelope(0, "letters.a", 1_001, "a"), Envelope(1, None, 1_002, "b")]
    assert enveloped.recv_many(10) == expected
    assert plain.recv_many(10) == ["a", "b"]


def test_every_way_of_reading_gives_the_envelope(make_bus: MakeBus) -> None:
    async def main() -> None:
        bus = make_bus(clock=Steps())
        tasks, threads = bus.subscribe_async(envelope=True), bus.subscribe(envelope=True)
        stream = EventReceiveStream(bus.subscribe_async(envelope=True))
        bus.publish_many(range(5))
        expected = [Envelope(number, None, 1_001 + number, number) for number in range(5)]
        assert [await tasks.recv(), tasks.try_recv()] == expected[:2]
        assert await tasks.recv_many(1) == expected[2:3]
        assert [await anext(tasks), await asyncio.create_task(tasks.recv())] == expected[3:]
        assert [await stream.receive() for _ in range(5)] == expected
        assert await asyncio.to_thread(threads.recv) == expected[0]
        assert await asyncio.to_thread(threads.recv_timeout, 1.0) == expected[1]
        assert await asyncio.to_thread(next, threads) == expected[2]
        assert threads.try_recv() == expected[3]
        sleeping = asyncio.create_task(tasks.recv())
        await asyncio.sleep(0)
        bus.publish("later")
        assert (await sleeping)[2:] == (1_006, "later")

    run(main)


def test_every_way_of_publishing_numbers_and_stamps(make_bus: MakeBus) -> None:
    async def main() -> None:
        bus = make_bus(clock=Steps())
        enveloped = bus.subscribe(envelope=True)
        topic = bus.topic("a")
        bus.publish("publish")
        bus.publish("on a topic", topic)
        bus.publish("by name", "a")
        await asyncio.to_thread(bus.publish_timeout, "in time", 1.0, "a")
        await bus.publish_async("async", "a")
        bus.publish_many(["many", "and more"], topic)
        topics = [None, "a", "a", "a", "a", "a", "a"]
        received = [enveloped.try_recv() for _ in topics]
        assert [each.sequence for each in received if each] == list(range(7))
        assert [each.ts_publish for each in received if each] == list(range(1_001, 1_008))
        assert [each.topic for each in received if each] == topics

    run(main)


def test_numbers_count_every_publication_from_the_first(make_bus: MakeBus) -> None:
    bus = make_bus()
    bus.publish("nobody was there")
    bus.publish("nobody wanted it", "a")
    wanted = bus.subscribe("b", envelope=True)
    bus.publish("unwanted", "a")
    bus.publish("wanted", "b")
    assert wanted.recv().sequence == 3


def test_what_nobody_has_takes_no_number() -> None:
    bus = tickbus.LockFreeEventBus[str](capacity=1)
    with bus, bus.subscribe(policy="reject", envelope=True) as reading:
        bus.publish("a")
        with pytest.raises(tickbus.Full):
            bus.publish("refused")
        assert reading.recv().sequence == 0
        bus.publish("b")
        assert reading.recv().sequence == 1


def test_the_time_is_that_of_the_system_where_no_clock_is_given(make_bus: MakeBus) -> None:
    bus = make_bus()
    assert bus.clock is time
    enveloped = bus.subscribe(envelope=True)
    before = time.time_ns()
    bus.publish("a")
    assert before <= enveloped.recv().ts_publish <= time.time_ns()


def test_a_publisher_that_waited_is_stamped_for_who_joined_meanwhile() -> None:
    patient = tickbus.BackpressureConfig(max_block_duration=PATIENCE_WITHOUT_END)
    bus = tickbus.LockFreeEventBus[str](1, patient)
    with bus, bus.subscribe() as full:
        bus.publish("fills it")
        waiting = threading.Thread(target=bus.publish, args=("waits", "a"))
        waiting.start()
        while not bus.explain().subscriptions[0].waiting_publishers:
            time.sleep(0)
        with bus.subscribe(envelope=True) as late:
            joined = time.time_ns()
            full.recv()
            envelope = late.recv()
            waiting.join()
    assert (envelope.sequence, envelope.topic, envelope.event) == (1, "a", "waits")
    assert envelope.ts_publish >= joined


def test_a_cancelled_publish_takes_no_number() -> None:
    async def main() -> None:
        bus = tickbus.LockFreeEventBus[str](1, clock=Steps())
        with bus, bus.subscribe(policy="reject", envelope=True) as full:
            bus.publish("a")
            waiting = asyncio.create_task(bus.publish_async("b"))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert full.try_recv() == Envelope(0, None, 1_001, "a")
            bus.publish("c")
            assert full.try_recv() == Envelope(1, None, 1_003, "c")

    run(main)


def test_a_snapshot_in_envelopes_tells_when_each_event_was_published(make_bus: MakeBus) -> None:
    bus = make_bus(keep_last="quotes.*", clock=Steps())
    bus.publish("old", "quotes.a")
    bus.publish("b", "quotes.b")
    bus.publish("new", "quotes.a")
    late = bus.subscribe("quotes.*", snapshot=True, envelope=True)
    bus.publish("live", "quotes.b")
    assert late.recv_many(1) + late.recv_many(1) + late.recv_many(1) == [
        Envelope(1, "quotes.b", 1_002, "b"),
        Envelope(2, "quotes.a", 1_003, "new"),
        Envelope(3, "quotes.b", 1_004, "live"),
    ]


def test_nobody_looked_at_the_clock_before_the_first_envelope(make_bus: MakeBus) -> None:
    bus = make_bus(keep_last=">")
    bus.publish("a", "quotes.a")
    bus.publish("b", "quotes.b")
    first, before = bus.subscribe(">", snapshot=True, envelope=True), time.time_ns()
    assert [first.recv(), first.recv()] == [(0, "quotes.a", 0, "a"), (1, "quotes.b", 0, "b")]
    bus.publish("c", "quotes.a")
    second = bus.subscribe(">", snapshot=True, envelope=True)
    assert second.recv() == (1, "quotes.b", 0, "b")
    assert second.recv() == first.recv() == (2, "quotes.a", pytest.approx(before, abs=1e11), "c")


def test_the_newest_of_each_key_comes_in_its_own_envelope(make_bus: MakeBus) -> None:
    bus = make_bus(clock=Steps())
    newest = bus.subscribe(policy="conflate", key=lambda event: event[0], envelope=True)
    for event in ("a1", "b1", "a2"):
        bus.publish(event)
    assert newest.recv_many(10) == [Envelope(2, None, 1_003, "a2"), Envelope(1, None, 1_002, "b1")]


def test_what_the_clock_raises_publish_raises_and_nobody_has_the_event(make_bus: MakeBus) -> None:
    class Broken:
        told: Any = None

        def time_ns(self) -> int:
            if self.told is None:
                raise LookupError("no time")
            return self.told  # type: ignore[no-any-return]

    clock = Broken()
    bus = make_bus(clock=clock)
    assert bus.clock is clock
    reading = bus.subscribe(envelope=True)
    with pytest.raises(LookupError, match="no time"):
        bus.publish("a")
    for wrong in (-1, 2**64, "noon", 1.5):
        clock.told = wrong
        with pytest.raises(TypeError, match=r"clock\.time_ns\(\) was .* ns since the Unix epoch"):
            bus.publish("a")
    assert reading.try_recv() is None
    clock.told = 2**64 - 1
    bus.publish("b")
    assert reading.recv() == Envelope(0, None, 2**64 - 1, "b")


def test_the_clock_may_use_the_bus(make_bus: MakeBus) -> None:
    class Publishing(Steps):
        def time_ns(self) -> int:
            if self.now == 1_000:
                self.now += 1
                bus.publish("from the clock")
            return super().time_ns()

    bus = make_bus(clock=Publishing())
    reading = bus.subscribe(envelope=True)
    bus.publish("outside")
    assert [each.event for each in reading.recv_many(2)] == ["from the clock", "outside"]


def test_no_python_code_runs_between_taking_an_event_and_giving_its_envelope(
    make_bus: MakeBus,
) -> None:
    bus = make_bus()
    enveloped = bus.subscribe(envelope=True)
    bus.publish_many(range(3))
    called: list[str] = []
    # What older tests have left to the collector is not what this is about.
    gc.disable()
    # Ctrl-C would be raised there, and the event be lost.
    sys.setprofile(lambda frame, event, argument: called.append(f"{event} {frame.f_code.co_name}"))
    try:
        received = [enveloped.try_recv(), *enveloped.recv_many(2)]
    finally:
        sys.setprofile(None)
        gc.enable()
    assert len(received) == 3
    assert [each for each in called if each.startswith("call ")] == []


def test_a_clock_that_knows_its_bus_is_collected_with_it() -> None:
    clock = Steps()
    bus = tickbus.EventBus[Any](clock=clock)
    vars(clock)["bus"] = bus
    gone = weakref.ref(clock)
    bus.close()
    del bus, clock
    gc.collect()
    assert gone() is None


def test_an_envelope_keeps_its_event_and_can_be_pickled() -> None:
    envelope = Envelope(7, "letters", 1, {"a": 1})
    assert pickle.loads(pickle.dumps(envelope)) == envelope
    sequence, topic, ts_publish, event = envelope
    assert (sequence, topic, ts_publish, event) == (7, "letters", 1, {"a": 1})
    assert repr(envelope) == "Envelope(sequence=7, topic='letters', ts_publish=1, event={'a': 1})"


def test_numbers_rise_for_each_publisher_and_none_is_given_twice(make_bus: MakeBus) -> None:
    bus = make_bus(capacity=4_096)
    enveloped = bus.subscribe(envelope=True)

    def publish(name: str) -> None:
        for number in range(500):
            bus.publish((name, number), "a")

    threads = [threading.Thread(target=publish, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    received = []
    while (envelope := enveloped.try_recv()) is not None:
        received.append(envelope)
    # One reader sees them in the order in which they were pushed, which is that of the numbers.
    assert [each.sequence for each in received] == list(range(2_000))
    for name in "abcd":
        assert [n for each in received for who, n in [each.event] if who == name] == [*range(500)]
