"""The event system: lanes, filters, batches, and who gets a critical event."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tickbus
from support import PATIENCE_WITHOUT_END, drops, run_child
from tickbus import (
    EVENT_DTYPE,
    Closed,
    ConfigError,
    CriticalOverflow,
    Event,
    EventBatch,
    EventSystem,
    EventType,
    Lagged,
    Priority,
    ReceiveTimeout,
    SystemSubscription,
)

LANES = ("critical", "high", "normal")


@pytest.fixture
def system() -> Iterator[EventSystem]:
    """A system with room for 4 critical events and 8 others, and without patience."""
    with EventSystem(4, 8, 8, max_block_duration=0.0) as system:
        yield system


def normal(number: int, symbol: str | None = None) -> Event:
    return Event(0, EventType.PriceUpdate, symbol=symbol, metadata=number)


def high(number: int) -> Event:
    return Event(0, EventType.PriceUpdate, Priority.High, metadata=number)


def stop(number: int) -> Event:
    return Event(0, EventType.EmergencyStop, metadata=number)


def numbers(events: Any) -> list[int]:
    return [event.metadata for event in events]


def read_all(subscription: SystemSubscription) -> list[int]:
    return numbers(iter(subscription.try_recv, None))


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does; the timeout of the test ends it."""
    while not condition():
        time.sleep(0)


def assert_books_close(system: EventSystem) -> None:
    metrics = system.metrics()
    published = 0
    for lane in LANES:
        numbers_of_lane = getattr(metrics, lane)
        published += numbers_of_lane.total_published
        for row in numbers_of_lane.subscriptions:
            assert row.offered == row.delivered + sum(row.dropped.values()) + row.pending, row
    assert published == system.total_events


def test_what_is_critical_is_read_first_then_what_is_high(system: EventSystem) -> None:
    with system.subscribe() as reader:
        for event in (normal(0), high(1), stop(2), normal(3), high(4)):
            assert system.publish(event) == 1
        assert (reader.pending, system.pending, system.total_events) == (5, 5, 5)
        assert reader.recv() == stop(2)
        assert read_all(reader) == [1, 4, 0, 3]
        assert_books_close(system)


def test_an_event_is_wanted_if_it_meets_every_argument_by_any_item(system: EventSystem) -> None:
    with (
        system.subscribe() as everything,
        system.subscribe(EventType.PriceUpdate, symbols=["BTC", "BRK.B"]) as prices,
        system.subscribe(["price_update", 33], topics="*.ETH") as narrow,
    ):
        assert [
            system.publish(event)
            for event in (
                normal(0, "BTC"),
                normal(1, "ETH"),
                Event(0, "order_placed", symbol="ETH", metadata=2),
                normal(3, "BRK.B"),
                normal(4),
            )
        ] == [2, 2, 2, 2, 1]
        assert [read_all(each) for each in (prices, narrow)] == [[0, 3], [1, 2]]
        assert narrow.pattern is not None
        assert narrow.pattern.endswith("&*.ETH")
        assert everything.pattern is None


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"types": []}, "types had no items"),
        ({"types": [250]}, "which has no name in this process"),
        ({"types": "no_such"}, 'event type was "no_such"'),
        ({"topics": "a..b"}, 'pattern was "a..b"'),
        ({"symbols": [2**31]}, "which has no name in this process"),
        ({"on_lag": "cry"}, 'on_lag was "cry"'),
    ],
)
def test_a_wish_that_cannot_be_kept_is_refused(
    system: EventSystem, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        system.subscribe(**wishes)


def test_what_is_no_event_is_refused(system: EventSystem) -> None:
    wrong: Any = object()
    for call in (system.publish, system.publish_batch, lambda each: system.publish_batch([each])):
        with pytest.raises(TypeError):
            call(wrong)
    with pytest.raises(TypeError, match="EVENT_DTYPE"):
        system.publish_batch(np.zeros(3))
    assert system.total_events == 0


def test_a_number_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="high_capacity was 0; it must be"):
        EventSystem(high_capacity=0)
    with pytest.raises(ConfigError, match="max_block_duration was -1"):
        EventSystem(max_block_duration=-1.0)
    with pytest.raises(ConfigError, match="max_topics"), EventSystem(max_topics=1) as system:
        system.publish_batch([normal(0, "BTC"), normal(1, "ETH")])
    assert system.total_events == 1


def test_with_one_of_three_readers_stuck_the_others_have_the_event_and_a_retry_doubles_nothing(
    system: EventSystem,
) -> None:
    with system.subscribe() as one, system.subscribe() as two, system.subscribe() as stuck:
        assert system.publish_batch([stop(number) for number in range(4)]) == 4
        assert read_all(one) == read_all(two) == [0, 1, 2, 3]
        with pytest.raises(CriticalOverflow, match="had no room for a critical event") as caught:
            system.publish(stop(4))
        overflow = caught.value
        assert (overflow.missing, overflow.taken, overflow.event) == ((stuck.id,), 2, stop(4))
        assert overflow.subscriptions == overflow.missing
        assert read_all(one) == read_all(two) == [4]
        with pytest.raises(CriticalOverflow) as again:
            overflow.retry()
        assert (again.value.missing, again.value.taken) == ((stuck.id,), 2)
        assert numbers(stuck.recv_many(9)) == [0, 1, 2, 3]
        with pytest.raises(Lagged, match="but 1 critical event went by unread") as lagged:
            stuck.recv()
        assert (lagged.value.missed, lagged.value.lane) == (1, "critical")
        assert again.value.retry() == 1
        assert read_all(stuck) == [4]
        assert read_all(one) == read_all(two) == []
        assert_books_close(system)
        row = system.metrics().critical.subscriptions[2]
        assert row.dropped == drops(block_expired=1)


def test_a_publisher_waits_for_room_and_holds_nobody_else_up() -> None:
    with (
        EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system,
        system.subscribe() as stuck,
        system.subscribe() as quick,
    ):
        system.publish(stop(0))
        assert quick.recv() == stop(0)
        publishing = threading.Thread(target=system.publish, args=(stop(1),))
        publishing.start()
        assert quick.recv() == stop(1)
        assert publishing.is_alive()
        assert stuck.recv() == stop(0)
        publishing.join()
        assert read_all(stuck) == [1]


def test_a_timeout_is_the_patience_of_one_call(system: EventSystem) -> None:
    with system.subscribe() as reader:
        system.publish_batch([stop(number) for number in range(4)])
        with pytest.raises(CriticalOverflow):
            system.publish_timeout(stop(4), timeout=0.001)
        assert system.publish_timeout(normal(5), 0.0) == 1
        assert numbers(reader.recv_many(4)) == [0, 1, 2, 3]
        with pytest.raises(Lagged):
            reader.recv()
        assert read_all(reader) == [5]


def test_a_loop_never_waits_for_room() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"publish_timeout\(\) would block"):
            system.publish_timeout(stop(1), 1.0)
        with pytest.raises(CriticalOverflow) as caught:
            system.publish(stop(1))
        with pytest.raises(CriticalOverflow):
            caught.value.retry(PATIENCE_WITHOUT_END)
        for call in (reader.recv, lambda: reader.recv_array(1), lambda: reader.recv_timeout(1.0)):
            with pytest.raises(RuntimeError, match=r"use subscribe_async\(\) there"):
                call()
        with pytest.raises(RuntimeError, match="aclose"):
            system.drain()

    with (
        EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system,
        system.subscribe() as reader,
    ):
        system.publish(stop(0))
        asyncio.run(main())
        assert reader.recv() == stop(0)
        with pytest.raises(Lagged):
            reader.recv()


def test_a_signal_ends_the_wait_for_room_and_those_without_it_are_told() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    with (
        EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system,
        system.subscribe() as full,
    ):
        system.publish(stop(0))
        with system.subscribe() as free:
            before = signal.signal(signal.SIGALRM, interrupt)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                with pytest.raises(Interrupted):
                    system.publish(stop(1))
            finally:
                signal.signal(signal.SIGALRM, before)
            assert read_all(free) == [1]
            assert full.recv() == stop(0)
            with pytest.raises(Lagged):
                full.try_recv()
            assert_books_close(system)


def test_a_handler_gets_the_overflow_instead_of_the_publisher(system: EventSystem) -> None:
    seen: list[CriticalOverflow] = []
    with system.subscribe() as reader:
        system.publish_batch([stop(number) for number in range(4)])
        system.handle_critical_overflow(seen.append)
        assert system.publish(stop(4)) == 0
        assert [overflow.missing for overflow in seen] == [(reader.id,)]

        def make_room(overflow: CriticalOverflow) -> int:
            reader.recv()
            return overflow.retry()

        system.handle_critical_overflow(make_room)
        assert system.publish(stop(5)) == 1
        system.handle_critical_overflow(CriticalOverflow.retry)
        with pytest.raises(CriticalOverflow):
            system.publish(stop(6))
        system.handle_critical_overflow(None)
        with pytest.raises(CriticalOverflow):
            system.publish(stop(7))


def test_an_overflow_is_pickled_without_what_is_left_to_do(system: EventSystem) -> None:
    with system.subscribe() as reader:
        with pytest.raises(CriticalOverflow) as caught:
            system.publish_batch([stop(number) for number in range(6)])
        assert caught.value.accepted == 4
        for clone in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
            assert (clone.missing, clone.taken, clone.event) == ((reader.id,), 0, stop(4))
            assert (clone.accepted, str(clone)) == (4, str(caught.value))
            with pytest.raises(tickbus.ForkedError, match="another process raised"):
                clone.retry()
        lagged = pickle.loads(pickle.dumps(Lagged(3, True, "high")))
        assert (lagged.missed, lagged.lane) == (3, "high")


def test_a_lane_that_overwrites_says_how_many_and_the_others_lose_nothing(
    system: EventSystem,
) -> None:
    with system.subscribe() as reader, system.subscribe(on_lag="count") as counting:
        system.publish_batch([high(number) for number in range(10)])
        system.publish_batch([normal(10), stop(11)])
        assert reader.recv() == stop(11)
        with pytest.raises(Lagged) as lagged:
            reader.recv_array(9)
        assert lagged.value.lane == "high"
        assert read_all(reader) == [*range(lagged.value.missed, 11)]
        assert (counting.on_lag, read_all(counting)[-1]) == ("count", 10)
        assert_books_close(system)


def array_of(events: list[Event]) -> np.ndarray[Any, Any]:
    return EventBatch(events).to_numpy().copy()


def test_batches_of_every_kind_are_published_and_read(system: EventSystem) -> None:
    events = [normal(0, "BTC"), high(1), normal(2, "ETH"), stop(3)]
    array = array_of(events)
    spread = np.zeros(8, EVENT_DTYPE)
    spread[::2] = array
    unaligned = np.frombuffer(b"-" + array.tobytes(), EVENT_DTYPE, offset=1)
    kinds: list[Any] = [events, tuple(events), iter(events), EventBatch(events), array, spread[::2]]
    for batch in (*kinds, unaligned):
        with system.subscribe() as reader:
            assert system.publish_batch(batch) == 4
            assert numbers(reader.recv_many(2)) == [3, 1]
            assert numbers(reader.recv_batch(9)) == [0, 2]
    assert system.publish_batch([]) == system.publish_batch(array[:0]) == 0
    assert system.total_events == 28


def test_an_array_is_read_with_one_copy_and_cannot_be_changed(system: EventSystem) -> None:
    with system.subscribe() as reader:
        system.publish_batch([normal(number, "BTC") for number in range(3)])
        array = reader.recv_array(9)
        assert (array.dtype, array.shape, array.flags.writeable) == (EVENT_DTYPE, (3,), False)
        assert array["metadata"].tolist() == [0, 1, 2]
        assert array["symbol"].tolist() == [tickbus.symbols.intern("BTC")] * 3


def test_events_are_written_into_the_place_of_an_array(system: EventSystem) -> None:
    with system.subscribe() as reader:
        places = np.zeros(6, EVENT_DTYPE)
        system.publish_batch([normal(1), high(2), stop(3)])
        assert reader.recv_into(places[::2]) == 3
        assert places["metadata"].tolist() == [3, 0, 2, 0, 1, 0]
        system.publish_batch([normal(4), normal(5)])
        assert reader.recv_into(places[:1]) == 1
        assert (places["metadata"][0], reader.pending) == (4, 1)
        places.flags.writeable = False
        with pytest.raises((ValueError, BufferError)):
            reader.recv_into(places)
        with pytest.raises(ConfigError, match="the array had no places"):
            reader.recv_into(np.zeros(0, EVENT_DTYPE))
        with pytest.raises(TypeError, match="EVENT_DTYPE"):
            reader.recv_into(np.zeros(3))
        assert numbers(reader.recv_many(9)) == [5]


def test_a_large_batch_is_published_in_order(system: EventSystem) -> None:
    count = 50_000
    with EventSystem(normal_capacity=2**16) as large, large.subscribe() as reader:
        array = np.zeros(count, EVENT_DTYPE)
        array["metadata"] = np.arange(count)
        array["event_type"][::1_000] = EventType.VolumeSpike
        assert large.publish_batch(array) == count
        received = np.concatenate([reader.recv_array(7_000) for _ in range(8)])
        assert received["metadata"].tolist() == list(range(count))
        assert_books_close(large)


def test_reading_waits_without_the_lock_and_times_out(system: EventSystem) -> None:
    with system.subscribe() as reader:
        with pytest.raises(ReceiveTimeout, match=r"no event came within 0.001 s"):
            reader.recv_timeout(0.001)
        calls: list[Callable[[], Any]] = [
            reader.recv,
            lambda: reader.recv_timeout(PATIENCE_WITHOUT_END),
            lambda: reader.recv_many(4)[0],
            lambda: reader.recv_batch(4)[0],
            lambda: EventBatch(reader.recv_array(4))[0],
        ]
        for make in (normal, high, stop):
            for call in calls:
                received: list[Event] = []
                thread = threading.Thread(target=lambda c=call, r=received: r.append(c()))
                thread.start()
                system.publish(make(7))
                thread.join()
                assert received == [make(7)]


def test_closing_ends_publishing_and_readers_read_what_is_pending(system: EventSystem) -> None:
    with system.subscribe() as reader, system.subscribe() as left:
        system.publish_batch([normal(0), stop(1)])
        left.close()
        system.close()
        system.close()
        assert (system.closed, reader.closed, left.closed) == (True, True, True)
        assert numbers(reader) == [1, 0]
        for call in (reader.recv, reader.try_recv, left.recv, lambda: reader.recv_batch(1)):
            with pytest.raises(Closed, match="everything was read"):
                call()
        with pytest.raises(Closed, match="the event system is closed"):
            system.publish(normal(2))
        with pytest.raises(Closed) as caught:
            system.publish_batch([stop(3)])
        assert caught.value.accepted == 0
        with pytest.raises(Closed):
            system.subscribe()
        assert_books_close(system)


def test_draining_waits_for_the_readers(system: EventSystem) -> None:
    with system.subscribe() as reader:
        system.publish_batch([normal(0), stop(1)])
        assert system.drain(timeout=0.001) == 2
        left: list[int] = []
        draining = threading.Thread(target=lambda: left.append(system.drain()))
        draining.start()
        assert numbers(reader.recv_many(9)) == [1, 0]
        draining.join()
        assert left == [0]
        assert asyncio.run(system.aclose(drain=1.0)) == 0
        with pytest.raises(ConfigError):
            asyncio.run(system.aclose(drain=-1.0))


def test_metrics_have_a_row_for_each_subscription_in_each_lane(system: EventSystem) -> None:
    with system.subscribe(name="risk") as reader:
        assert (reader.name, reader.id) == ("risk", 0)
        with pytest.raises(ConfigError, match="risk"):
            system.subscribe(name="risk")
        system.publish(high(0))
        metrics = system.metrics()
        rows = [getattr(metrics, lane).subscriptions[0] for lane in LANES]
        assert [row.name for row in rows] == ["risk"] * 3
        assert [row.pending for row in rows] == [0, 1, 0]
        assert [row.policy for row in rows] == ["block", "drop_oldest", "drop_oldest"]


def test_texts_say_what_it_is(system: EventSystem) -> None:
    with system.subscribe(symbols="BTC") as reader:
        system.publish(normal(1, "BTC"))
        assert repr(system) == "<EventSystem total_events=1 pending=1>"
        assert repr(reader) == "<SystemSubscription id=0 pattern=*.BTC pending=1>"
        system.close()
        assert repr(system) == "<EventSystem total_events=1 pending=1 closed>"
        for each in (system, reader):
            with pytest.raises(TypeError, match="it belongs to one process"):
                pickle.dumps(each)


def test_an_unclosed_subscription_is_reported(system: EventSystem) -> None:
    with pytest.warns(ResourceWarning, match="unclosed <SystemSubscription id=0"):
        system.subscribe()


def test_a_handler_that_knows_its_system_keeps_it_not_alive() -> None:
    class Desk:
        def __init__(self) -> None:
            self.system = EventSystem()
            self.system.handle_critical_overflow(self.on_overflow)

        def on_overflow(self, overflow: CriticalOverflow) -> None:
            raise overflow

    weak = weakref.ref(Desk())
    gc.collect()
    assert weak() is None


def test_a_child_by_fork_is_refused() -> None:
    child = run_child(
        """
        import os, tickbus
        system = tickbus.EventSystem()
        reader = system.subscribe()
        event = tickbus.Event(0, "price_update")
        system.publish(event)
        if os.fork() == 0:
            for call in (
                lambda: system.publish(event), lambda: system.publish_batch([event]), system.close,
                system.subscribe, reader.try_recv, lambda: reader.recv_batch(1), reader.close,
                lambda: reader.pending, lambda: system.pending, system.metrics, system.drain,
            ):
                try:
                    call()
                except tickbus.ForkedError:
                    continue
                os._exit(1)
            assert repr(system) == "<EventSystem of another process>"
            assert repr(reader) == "<SystemSubscription of another process>"
            os._exit(0)
        _, status = os.wait()
        assert status == 0, status
        assert reader.recv() == event
        reader.close()
        """
    )
    assert child.returncode == 0, child.stderr


def test_the_interpreter_ends_while_threads_wait_inside() -> None:
    child = run_child(
        """
        import threading, tickbus
        system = tickbus.EventSystem(1, max_block_duration=1e6)
        full, empty = system.subscribe(), system.subscribe(symbols="NOBODY")
        stop = tickbus.Event(0, "emergency_stop")
        system.publish(stop)

        def swallow(call):
            try:
                call()
            except (tickbus.Closed, tickbus.CriticalOverflow):
                pass

        for call in (lambda: system.publish(stop), empty.recv, lambda: empty.recv_array(9)):
            threading.Thread(target=swallow, args=(call,), daemon=True).start()
        """
    )
    assert (child.returncode, child.stderr) == (0, "")
