"""The ring: what it keeps for who joins late, what it cannot keep, and how long events live."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import tickbus
from support import Hole, assert_sums_closed, read_all, run


class Payload:
    """An event that can be watched."""


def test_who_joins_late_begins_with_the_oldest_that_is_kept_or_where_it_asks() -> None:
    with tickbus.RingEventBus[int](16) as bus:

        def read_from(start: Any) -> list[Any]:
            with bus.subscribe(start=start) as late:
                found = read_all(late)
                assert_sums_closed(bus)
                return found

        bus.publish_many(range(40))
        kept = read_from("oldest")
        assert kept == list(range(40))[-len(kept) :]
        assert len(kept) >= 12
        assert read_from("now") == []
        assert read_from(38) == [38, 39]
        assert read_from(3) == [Hole(40 - len(kept) - 3), *kept]


def test_a_reader_that_comes_again_goes_on_where_it_stopped() -> None:
    with tickbus.RingEventBus[int](16) as bus:
        received: list[int] = []
        for first in range(0, 40, 4):
            with bus.subscribe(start=len(received)) as reader:
                bus.publish_many(range(first, first + 4))
                received += reader.recv_many(3)
        with bus.subscribe(start=len(received)) as reader:
            received += reader.recv_many(40)
        assert received == list(range(40))


def test_a_late_reader_in_a_task_goes_on_with_live_events() -> None:
    async def main() -> list[int]:
        with tickbus.RingEventBus[int](8) as bus:
            bus.publish_many(range(3))
            late = bus.subscribe_async(start="oldest")
            bus.publish(3)
            return [await late.recv() for _ in range(4)]

    assert run(main) == [0, 1, 2, 3]


def test_a_late_reader_with_a_pattern_is_told_that_nobody_knows_what_it_missed() -> None:
    with tickbus.RingEventBus[int](4) as bus:
        bus.publish_many(range(9), "trades.A")
        late = bus.subscribe("trades.*", start=0)
        with pytest.raises(tickbus.Lagged) as told:
            late.try_recv()
        assert not told.value.exact
        assert read_all(late) == list(range(told.value.missed, 9))


@pytest.mark.parametrize("start", ["later", -1, 1.5, 2**64, [0]])
def test_a_start_that_is_none_is_refused(start: Any) -> None:
    with (
        tickbus.RingEventBus[int](4) as bus,
        pytest.raises(tickbus.ConfigError, match="start was"),
    ):
        bus.subscribe(start=start)


def test_a_start_in_the_future_is_refused() -> None:
    with tickbus.RingEventBus[int](4) as bus:
        bus.publish(0)
        with pytest.raises(tickbus.ConfigError, match="sequence 2; the next event has 1"):
            bus.subscribe(start=2)


@pytest.mark.parametrize("backend", ["lock_free", "broadcast"])
@pytest.mark.parametrize("start", ["oldest", 0])
def test_only_a_ring_keeps_events_for_who_joins_late(backend: str, start: Any) -> None:
    with (
        tickbus.EventBus[int](backend) as bus,
        pytest.raises(tickbus.ConfigError, match="use backend ring"),
    ):
        bus.subscribe(start=start)


def test_a_ring_refuses_to_drop_the_newest_and_says_what_can() -> None:
    with (
        tickbus.RingEventBus[int](4) as bus,
        pytest.raises(tickbus.ConfigError, match="lock_free"),
    ):
        bus.subscribe(policy="drop_newest")


def test_an_event_lives_until_the_ring_has_come_round_or_is_gone() -> None:
    bus = tickbus.RingEventBus[Payload](4)
    reader = bus.subscribe()
    first = Payload()
    watched = weakref.ref(first)
    bus.publish(first)
    assert reader.try_recv() is first
    del first
    gc.collect()
    assert watched() is not None
    for _ in range(4):
        bus.publish(Payload())
        reader.try_recv()
    gc.collect()
    assert watched() is None
    last = Payload()
    watched = weakref.ref(last)
    bus.publish(last)
    reader.close()
    bus.close()
    del last, reader, bus
    gc.collect()
    assert watched() is None


def test_a_cycle_through_an_event_that_was_received_is_collected() -> None:
    bus = tickbus.RingEventBus[Any](4)
    reader = bus.subscribe()
    event = Payload()
    event.bus, event.reader = bus, reader  # type: ignore[attr-defined]
    watched = weakref.ref(event)
    bus.publish(event)
    assert reader.try_recv() is event
    bus.close()
    reader.close()
    del event, bus, reader
    gc.collect()
    assert watched() is None


def test_the_envelopes_of_what_was_published_before_are_numbered() -> None:
    with tickbus.RingEventBus[str](8) as bus:
        bus.publish_many(["a", "b"], "trades.A")
        late = bus.subscribe(start="oldest", envelope=True)
        bus.publish("c", "trades.B")
        envelopes = late.recv_many(3)
        assert [(each.sequence, each.topic, each.event) for each in envelopes] == [
            (0, "trades.A", "a"),
            (1, "trades.A", "b"),
            (2, "trades.B", "c"),
        ]
        assert [each.ts_publish > 0 for each in envelopes] == [False, False, True]
