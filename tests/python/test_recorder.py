"""Recording: the last events, each loss counted, and the same again in any bus."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import tickbus
from support import MakeBus, run
from test_envelope import Steps
from test_events import TYPED_EXAMPLES
from tickbus import pacing
from tickbus.recorder import EventRecorder
from tickbus.typed import TypedEventBus

_SECOND = 1_000_000_000


class Moments:
    """A clock that tells given moments."""

    def __init__(self, *moments: int) -> None:
        self.moments = iter(moments)

    def time_ns(self) -> int:
        return next(self.moments)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Has pacing wait in no time; gives the seconds for which it would have waited."""
    now = 0
    waited: list[float] = []

    def wait(seconds: float) -> None:
        nonlocal now
        now += round(seconds * 1e9)
        waited.append(seconds)

    monkeypatch.setattr(pacing.time, "perf_counter_ns", lambda: now)
    monkeypatch.setattr(pacing.time, "sleep", wait)
    return waited


def test_the_last_events_are_kept_with_number_topic_and_time(make_bus: MakeBus) -> None:
    bus = make_bus(clock=Steps())
    bus.publish("before")
    with EventRecorder(bus, 3) as recorder:
        bus.publish("a", "letters")
        bus.publish("b")
        assert recorder.capacity == 3
        assert recorder.get_events() == [(1, "letters", 1_002, "a"), (2, None, 1_003, "b")]
        assert recorder.lost == 0
        bus.publish_many("cd")
        assert [each.event for each in recorder.get_events()] == ["b", "c", "d"]
        assert recorder.lost == 1


@pytest.mark.parametrize("looks", [1, 3, 40])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_what_is_kept_and_what_is_lost_is_everything(make_bus: MakeBus, n: int, looks: int) -> None:
    bus = make_bus(capacity=8)
    with EventRecorder(bus, n) as recorder:
        for number in range(40):
            bus.publish(number)
            if number % (40 // looks) == 0:
                recorder.get_events()
        events = [each.event for each in recorder.get_events()]
        assert events == list(range(40 - n, 40))
        assert recorder.lost == 40 - n


def test_a_recording_outlives_its_bus_and_its_end(make_bus: MakeBus) -> None:
    bus = make_bus()
    recorder = EventRecorder(bus, 4)
    bus.publish("a")
    bus.close()
    assert [each.event for each in recorder.get_events()] == ["a"]
    recorder.close()
    recorder.close()
    assert [each.event for each in recorder.get_events()] == ["a"]
    assert recorder.lost == 0


def test_a_recorder_cannot_keep_more_than_a_shared_ring() -> None:
    with tickbus.BroadcastEventBus(8) as bus, pytest.raises(tickbus.ConfigError, match="capacity"):
        EventRecorder(bus, 9)


@pytest.mark.parametrize("n", [0, -1])
def test_a_recorder_keeps_at_least_one_event(make_bus: MakeBus, n: int) -> None:
    with pytest.raises(tickbus.ConfigError, match="capacity"):
        EventRecorder(make_bus(), n)


def test_readers_of_a_recording_take_nothing_from_each_other(make_bus: MakeBus) -> None:
    bus = make_bus(capacity=1_024)
    with EventRecorder(bus, 1_024) as recorder:
        seen: list[list[Any]] = [[], [], []]

        def look(place: int) -> None:
            while len(seen[place]) < 1_000:
                seen[place] = [each.event for each in recorder.get_events()]

        threads = [threading.Thread(target=look, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1_000):
            bus.publish(number)
        for thread in threads:
            thread.join()
    assert seen == [list(range(1_000))] * 3


def test_a_replay_gives_the_same_events_on_the_same_topics_in_the_same_order(
    make_bus: MakeBus,
) -> None:
    bus, other = make_bus(), make_bus(clock=Steps())
    again = other.subscribe(envelope=True)
    with EventRecorder(bus, 16) as recorder:
        for number, topic in enumerate(["a", "b", None, "a.c"]):
            bus.publish(number, topic)
        assert recorder.replay(other) == 4
        assert again.recv_many(9) == [
            (0, "a", 1_001, 0),
            (1, "b", 1_002, 1),
            (2, None, 1_003, 2),
            (3, "a.c", 1_004, 3),
        ]
        assert recorder.replay(bus) == 4
        assert [each.event for each in recorder.get_events()] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_typed_recording_replays_into_a_typed_bus(backend: str) -> None:
    events = [each.values[0] for each in TYPED_EXAMPLES]
    with TypedEventBus(tickbus.EventBus(backend)) as bus, TypedEventBus() as other:
        bus.with_recording(64)
        for event in events:
            bus.publish(event)
        with other.bus.subscribe(envelope=True) as again:
            assert bus.recorder().replay(other) == len(events)
            received = again.recv_many(64)
        assert [each.event for each in received] == events
        assert [each.topic for each in received] == [
            each.topic for each in bus.recorder().get_events()
        ]
        assert {row.published for row in other.get_stats().values()} == {1}


@pytest.mark.parametrize("speed", [1.0, 10.0])
def test_a_replay_is_paced_by_the_recorded_time(waits: list[float], speed: float) -> None:
    moments = [0, _SECOND, 3 * _SECOND, 3 * _SECOND, 2 * _SECOND, 5_000 * _SECOND]
    with (
        tickbus.EventBus[int](clock=Moments(*moments)) as bus,
        EventRecorder(bus, 8) as recorder,
        tickbus.EventBus[int]() as other,
        other.subscribe() as again,
    ):
        bus.publish_many(range(6))
        assert recorder.replay(other, speed) == 6
        # Time that went back is no gap, and nobody waits for more than an hour.
        assert waits == pytest.approx([1.0 / speed, 2.0 / speed])
        assert again.recv_many(9) == list(range(6))
        waits.clear()
        recorder.replay(other, speed, longest_gap=1.5)
        assert waits == pytest.approx([1.0 / speed])
        waits.clear()
        recorder.replay(other)
        assert waits == []


@pytest.mark.parametrize("speed", [-1.0, float("nan"), float("inf")])
def test_a_speed_that_is_none_is_refused(make_bus: MakeBus, speed: float) -> None:
    bus = make_bus()
    with EventRecorder(bus, 1) as recorder, pytest.raises(tickbus.ConfigError, match="speed was"):
        recorder.replay(bus, speed)


def test_a_paced_replay_never_blocks_an_event_loop(make_bus: MakeBus) -> None:
    async def main() -> None:
        bus = make_bus()
        with EventRecorder(bus, 4) as recorder:
            bus.publish("a")
            with pytest.raises(RuntimeError, match=r"asyncio\.to_thread"):
                recorder.replay(bus, 1.0)
            assert recorder.replay(bus) == 1
            assert await asyncio.to_thread(recorder.replay, bus, 1_000.0) == 2

    run(main)


def test_a_replay_ends_where_the_bus_is_closed(make_bus: MakeBus) -> None:
    bus, other = make_bus(), make_bus()
    with EventRecorder(bus, 4) as recorder:
        bus.publish("a")
        other.close()
        with pytest.raises(tickbus.Closed):
            recorder.replay(other)
