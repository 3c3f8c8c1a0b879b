"""A log as a subscriber: what is published is stored, and what is missed is a gap in it."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import tickbus
from support import MakeBus, run_child
from tickbus import Attachment, Event, EventStore, EventSystem, EventType, Gap
from tickbus.attach import Published
from tickbus.events import Fill, Health
from tickbus.typed import TypedEventBus

SMALL = 64 * 1024
"""Bytes of the smallest segment."""
FILL = Fill(
    7, "BTCUSDT", "f1", "o1", "buy", Decimal("61000.10"), Decimal("0.5"), Decimal("0.01"), "USDT"
)


def event(number: int) -> Event:
    return Event(number, EventType.PriceUpdate, 1, "binance", "BTCUSDT", number / 4)


def read(store: EventStore) -> list[Any]:
    return [record.event for record in store.read()]


def full_store(folder: Path) -> EventStore:
    """Returns a store that has no room for another record."""
    store = EventStore.open(folder, segment_bytes=SMALL, max_bytes=2 * SMALL)
    with pytest.raises(tickbus.StoreFull):
        store.append_many(range(100_000))
    return store


def test_what_a_bus_publishes_is_stored_in_order_with_its_topics(
    store: EventStore, make_bus: MakeBus
) -> None:
    with make_bus(capacity=128) as bus, store.attach(bus) as attachment:
        bus.publish({"n": 1}, topic="notes.a")
        bus.publish(FILL, topic="fills")
        bus.publish(event(5), topic="anything")
        bus.publish_many(range(100))
        assert attachment.attached
    assert (attachment.stored, attachment.missed, attachment.failure) == (103, 0, None)
    assert not attachment.attached
    records = list(store.read())
    assert [record.event for record in records] == [{"n": 1}, FILL, event(5), *range(100)]
    assert [record.topic for record in records[:4]] == [
        "notes.a",
        "fills",
        "price_update.BTCUSDT",
        None,
    ]


def test_what_a_typed_bus_publishes_comes_back_as_its_class(store: EventStore) -> None:
    health = Health(1_700_000_000_000_000_000, "feed", "healthy")
    with TypedEventBus() as bus, store.attach(bus):
        bus.publish(FILL)
        bus.publish(health)
    assert [(record.topic, record.event) for record in store.read()] == [
        ("fill.BTCUSDT", FILL),
        ("health", health),
    ]


def test_what_a_system_publishes_is_stored_lane_by_lane(store: EventStore) -> None:
    stop = Event(1, EventType.EmergencyStop, symbol="BTCUSDT")
    with EventSystem() as system, store.attach(system) as attachment:
        system.publish_batch([event(number) for number in range(5_000)])
        system.publish(stop)
    assert (attachment.stored, attachment.missed, attachment.failure) == (5_001, 0, None)
    stored = read(store)
    assert [each for each in stored if each != stop] == [event(number) for number in range(5_000)]


@pytest.mark.parametrize("make", [tickbus.EventBus, EventSystem])
def test_closing_the_log_or_the_source_first_stores_what_was_published(
    make: type[Any], folder: Path
) -> None:
    for closes_source in (True, False):
        with EventStore.open(folder) as store:
            before = store.stats().next_sequence
            source = make()
            attachment = store.attach(source)
            for number in range(500):
                assert source.publish(event(number)) == 1
            if closes_source:
                source.close()
            store.close()
            assert not attachment.attached
            source.close()
        with EventStore.open(folder, read_only=True) as store:
            stored = [record.event for record in store.read(before)]
        assert stored == [event(number) for number in range(500)]
        assert (attachment.stored, attachment.missed, attachment.failure) == (500, 0, None)
        attachment.detach()


def test_a_closed_source_ends_the_attachment_by_itself(store: EventStore) -> None:
    bus = tickbus.EventBus[int]()
    attachment = store.attach(bus)
    bus.publish_many(range(10))
    bus.close()
    attachment._thread.join()
    assert (read(store), attachment.failure) == ([*range(10)], None)


class WaitingStore(EventStore):
    """A store that appends what a bus has delivered only while it may."""

    begun: threading.Event
    may_append: threading.Event

    def _append_delivered(self, delivered: Any) -> Any:
        self.begun.set()
        self.may_append.wait()
        return super()._append_delivered(delivered)


@pytest.mark.parametrize("ends_by", ["detaching", "closing the bus"])
def test_what_a_slow_log_misses_is_a_gap_where_it_is_missing(
    folder: Path, make_bus: MakeBus, ends_by: str
) -> None:
    with WaitingStore.open(folder) as store, make_bus(capacity=4) as bus:
        store.begun, store.may_append = threading.Event(), threading.Event()
        attachment = store.attach(bus)
        bus.publish(0)
        store.begun.wait()
        for number in range(1, 12):
            bus.publish(number)
        store.may_append.set()
        if ends_by == "detaching":
            attachment.detach()
        else:
            bus.close()
            attachment._thread.join()
        stored = read(store)
    position = missed = 0
    for found in stored:
        if isinstance(found, Gap):
            position += found.missed
            missed += found.missed
        else:
            assert found == position
            position += 1
    assert position == 12
    assert missed > 0
    assert (attachment.stored, attachment.missed) == (12 - missed, missed)


def test_what_no_log_can_hold_is_a_gap_and_is_told_once(
    store: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    with tickbus.EventBus[Any]() as bus, store.attach(bus) as attachment:
        for unstorable in (object(), "x" * (1 << 20), {1: object()}):
            bus.publish("before")
            bus.publish(unstorable)
            bus.publish(event(1))
    one = Gap(1, True)
    assert read(store) == ["before", one, event(1)] * 3
    assert (attachment.stored, attachment.missed, attachment.failure) == (6, 3, None)
    [told] = caplog.records
    assert told.levelno == logging.WARNING
    assert "msgspec cannot encode" in told.getMessage()


@pytest.mark.parametrize("make", [tickbus.EventBus, EventSystem])
def test_a_full_log_detaches_itself_tells_why_and_no_publisher_waits(
    make: type[Any], folder: Path
) -> None:
    told: SimpleQueue[tuple[Exception, str]] = SimpleQueue()
    with full_store(folder) as store, make() as source:
        attachment = store.attach(
            source, on_detach=lambda why: told.put((why, threading.current_thread().name))
        )
        published = 0
        while source.publish(event(1)):
            published += 1
        why, thread = told.get()
        attachment.detach()
        assert isinstance(why, tickbus.StoreFull)
        assert thread == "tickbus-attach"
        assert attachment.failure is not None
        assert type(attachment.failure) is type(why)
        assert str(attachment.failure) == str(why)
        assert not attachment.attached
        assert attachment.missed > 0
        assert attachment.stored + attachment.missed <= published
        assert store.stats().detached == 1


@pytest.mark.parametrize("make", [tickbus.EventBus, EventSystem])
def test_what_a_log_had_not_stored_when_it_detached_itself_is_counted_as_missed(
    make: type[Any], folder: Path
) -> None:
    with full_store(folder) as store:
        missed = 0
        for _ in range(2):
            with make() as source:
                attachment = store.attach(source)
                published = 0
                while source.publish(event(1)):
                    published += 1
                attachment.wait()
                assert 0 < attachment.missed <= published - attachment.stored
                missed += attachment.missed
                assert store.stats().missed == missed


def test_who_is_told_may_close_the_log_and_nobody_has_to_be_told(folder: Path) -> None:
    store = full_store(folder)
    with tickbus.EventBus[int]() as bus, EventSystem() as system:
        quiet = store.attach(system)
        closing = store.attach(bus, on_detach=lambda why: store.close())
        while bus.publish(1):
            pass
        closing._thread.join()
        assert store.closed
        assert isinstance(closing.failure, tickbus.StoreFull)
        assert (quiet.failure, quiet.attached) == (None, False)


def test_two_that_are_told_at_once_may_both_close_the_log(folder: Path) -> None:
    store, both = full_store(folder), threading.Barrier(2)

    def close(why: Exception) -> None:
        both.wait(30.0)
        store.close()

    with tickbus.EventBus[int]() as bus, EventSystem() as system:
        attachments = [store.attach(source, on_detach=close) for source in (bus, system)]
        while bus.publish(1):
            pass
        while system.publish(event(1)):
            pass
        for attachment in attachments:
            attachment._thread.join(30.0)
            assert not attachment._thread.is_alive(), "each waits for the other one"
            assert isinstance(attachment.failure, tickbus.StoreFull)
        assert store.closed


def test_as_many_as_had_room_are_counted_as_stored(folder: Path) -> None:
    with (
        EventStore.open(folder, segment_bytes=SMALL, max_bytes=2 * SMALL) as store,
        tickbus.EventBus[bytes](capacity=64) as bus,
    ):
        attachment = store.attach(bus)
        published = 0
        while bus.publish(bytes(1_000)):
            published += 1
        attachment.detach()
        assert isinstance(attachment.failure, tickbus.StoreFull)
        assert attachment.stored == store.stats().next_sequence > 50
        assert attachment.stored + attachment.missed <= published


def test_a_log_that_takes_nothing_is_told_before_anybody_waits_for_it(
    folder: Path, make_bus: MakeBus
) -> None:
    with EventStore.open(folder) as store:
        store.append(1)
    with make_bus() as bus, EventSystem() as system:
        sources: list[Published] = [bus, system]
        with EventStore.open(folder, read_only=True) as reader:
            for source in sources:
                with pytest.raises(tickbus.ReadOnly):
                    reader.attach(source)
                with pytest.raises(tickbus.Closed):
                    store.attach(source)
        assert (bus.publish(1), system.publish(event(1))) == (0, 0)
        with EventStore.open(folder) as store:
            with pytest.raises(TypeError, match="it must be an EventSystem, an EventBus"):
                store.attach(store)  # type: ignore[arg-type]
            bus.close()
            system.close()
            for source in sources:
                with pytest.raises(tickbus.Closed):
                    store.attach(source)


@pytest.mark.parametrize("make", [tickbus.EventBus, EventSystem])
@pytest.mark.parametrize("is_started", [False, True])
def test_a_log_that_is_closed_while_something_is_attached_refuses_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: type[Any], is_started: bool
) -> None:
    store = EventStore.open(folder)
    start = threading.Thread.start
    attaching: list[threading.Thread] = []

    def close_around(thread: threading.Thread) -> None:
        attaching.append(thread)
        if not is_started:
            store.close()
        start(thread)
        if is_started:
            store.close()

    monkeypatch.setattr(threading.Thread, "start", close_around)
    with make() as source:
        with pytest.raises(tickbus.Closed, match="the log is closed"):
            store.attach(source)
        assert source.publish(event(1)) == 0
    assert [thread.is_alive() for thread in attaching] == [False]


def test_a_log_that_is_being_closed_takes_no_further_source(
    folder: Path, make_bus: MakeBus
) -> None:
    store = WaitingStore.open(folder)
    store.begun, store.may_append = threading.Event(), threading.Event()
    with make_bus() as bus, EventSystem() as system:
        store.attach(bus)
        bus.publish(1)
        store.begun.wait()
        closing = threading.Thread(target=store.close, daemon=True)
        is_closing = threading.Event()
        stop = Attachment.detach

        def tell(attachment: Attachment) -> None:
            is_closing.set()
            stop(attachment)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Attachment, "detach", tell)
            closing.start()
            is_closing.wait()
        with pytest.raises(tickbus.Closed, match="the log is closed"):
            store.attach(system)
        assert system.publish(event(1)) == 0
        store.may_append.set()
        closing.join()
    with EventStore.open(folder, read_only=True) as store:
        assert read(store) == [1]


def test_what_cannot_be_told_is_refused_before_anything_is_attached(store: EventStore) -> None:
    with EventSystem() as system:
        with pytest.raises(TypeError, match="on_detach was 5; it must be a function"):
            store.attach(system, on_detach=5)  # type: ignore[arg-type]
        assert system.publish(event(1)) == 0


def test_an_attachment_shows_whether_it_is_one_still(store: EventStore) -> None:
    with EventSystem() as system, store.attach(system) as attachment:
        assert repr(attachment) == f"<Attachment to {store!r}>"
    assert repr(attachment) == f"<Attachment to {store!r} detached>"
    assert isinstance(attachment, Attachment)


def test_what_is_attached_when_the_interpreter_ends_is_stored(folder: Path) -> None:
    child = run_child(f"""
        import tickbus
        store = tickbus.EventStore.open({str(folder)!r})
        bus, system = tickbus.EventBus(), tickbus.EventSystem()
        store.attach(bus), store.attach(system)
        for number in range(1_000):
            bus.publish(number)
            system.publish(tickbus.Event(number, 1))
        """)
    assert (child.returncode, child.stderr) == (0, "")
    with EventStore.open(folder, read_only=True) as store:
        stored = read(store)
    assert [each for each in stored if isinstance(each, int)] == list(range(1_000))
    assert len(stored) == 2_000


def test_whoever_is_told_that_a_store_has_detached_itself_may_wait_for_it(folder: Path) -> None:
    told: SimpleQueue[bool] = SimpleQueue()
    with full_store(folder) as store, EventSystem() as system:
        attachment = store.attach(system, on_detach=lambda why: told.put(attachment.wait()))
        while system.publish(event(1)):
            pass
        assert told.get()
        assert attachment.wait(60)


def test_a_forked_child_leaves_attachments_to_its_parent(folder: Path) -> None:
    child = run_child(f"""
        import os, warnings
        import tickbus
        warnings.simplefilter("ignore", DeprecationWarning)
        store = tickbus.EventStore.open({str(folder)!r})
        bus, system = tickbus.EventBus(), tickbus.EventSystem()
        attachments = [store.attach(bus), store.attach(system)]
        process = os.fork()
        if process == 0:
            for attachment in attachments:
                with attachment:
                    pass
                for call in (attachment.detach, attachment.wait):
                    try:
                        call()
                    except tickbus.ForkedError:
                        continue
                    os._exit(1)
            with store:
                pass
            raise SystemExit(0)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        bus.publish(1)
        system.publish(tickbus.Event(2, 1))
        store.close()
        assert [a.stored for a in attachments] == [1, 1]
        """)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


_WRITER = """
import sys
import tickbus
bus, system = tickbus.EventBus(), tickbus.EventSystem()
store = tickbus.EventStore.open(sys.argv[1])
store.attach(bus), store.attach(system)
number = 0
while True:
    bus.publish(number)
    system.publish(tickbus.Event(number, 1))
    if number == 1_000:
        store.sync()
        print(flush=True)
    number += 1
"""


def test_killing_the_process_leaves_a_log_that_is_sound_and_in_order(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, folder], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    with EventStore.open(folder) as store:
        stored = read(store)
    numbers = [each for each in stored if isinstance(each, int)]
    events = [each.timestamp for each in stored if isinstance(each, Event)]
    assert numbers == list(range(len(numbers)))
    assert events == list(range(len(events)))
    EventStore.verify(folder)


def test_what_a_replay_publishes_is_not_stored_again(
    store: EventStore, tmp_path: Path, make_bus: MakeBus
) -> None:
    with EventStore.open(tmp_path / "recorded") as recorded:
        recorded.append_many([event(number) for number in range(10)])
        bus = make_bus()
        with store.attach(bus) as attachment:
            with pytest.raises(tickbus.ReplayRefused):
                tickbus.Replay(recorded).into(bus, speed=0)
            tickbus.Replay(recorded).into(bus, speed=0, mixed=True).wait()
            bus.publish("live")
        assert (attachment.stored, attachment.missed) == (1, 0)
    assert read(store) == ["live"]
