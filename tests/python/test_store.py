"""The event log in real folders: what is appended is read, and what was acknowledged stays."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tickbus
from support import run, run_child
from tickbus import Event, EventBatch, EventStore, EventType, Gap, Record, records
from tickbus.events import BookLevel, Fill, Health, Metrics, OrderBook

SMALL = 64 * 1024
"""Bytes of the smallest segment."""
DURABILITIES = ("none", "interval(5)", "group", "always", "double")

Open = Callable[..., EventStore]


def event(number: int, symbol: str = "BTCUSDT") -> Event:
    return Event(number, EventType.PriceUpdate, 1, "binance", symbol, number / 4, 1 << 40)


def events(count: int) -> list[Event]:
    return [event(number) for number in range(count)]


def read(store: EventStore, from_sequence: int = 0) -> list[Any]:
    """Returns the events, after a look at their sequences."""
    records = list(store.read(from_sequence))
    assert [record.sequence for record in records] == [
        from_sequence + place for place in range(len(records))
    ]
    return [record.event for record in records]


@dataclasses.dataclass
class Note:
    text: str
    tags: list[str]


class Point(msgspec.Struct):
    x: int
    y: float


FILL = Fill(
    7, "BTCUSDT", "f1", "o1", "buy", Decimal("61000.10"), Decimal("0.5"), Decimal("0.01"), "USDT"
)
BOOK = OrderBook(9, "BTCUSDT", (BookLevel(Decimal(1), Decimal(2)),), ())


# Appending and reading


def test_events_objects_and_gaps_are_read_in_the_order_in_which_they_were_appended(
    folder: Path,
) -> None:
    with EventStore.open(folder, segment_bytes=SMALL) as store:
        assert store.append(event(5)) == 0
        assert store.append({"a": [1, "b"]}, topic="notes.a") == 1
        assert store.append_gap(9, exact=False) == 2
        assert store.append(FILL, "fills") == 3
        assert store.append_many(events(5_000)) == range(4, 5_004)
        expected = [
            Record(0, 5, "price_update.BTCUSDT", event(5), False),
            Record(1, 0, "notes.a", {"a": [1, "b"]}, False),
            Record(2, 0, None, Gap(9, False), False),
            Record(3, 7, "fills", FILL, False),
        ]
        assert list(itertools.islice(store.read(), 4)) == expected
        assert read(store, 4) == events(5_000)
        assert store.stats().segments > 1
    with EventStore.open(folder, read_only=True) as again:
        assert list(again.read())[:4] == expected
        assert read(again, 2_504) == events(5_000)[2_500:]


def test_a_batch_an_array_and_a_list_are_appended_alike(store: EventStore) -> None:
    three = events(600)
    assert store.append_many(EventBatch(three)) == range(600)
    assert store.append_many(EventBatch(three).to_numpy()) == range(600, 1_200)
    assert store.append_many(EventBatch(three).to_numpy()[::-1]) == range(1_200, 1_800)
    assert store.append_many(three) == range(1_800, 2_400)
    assert store.append_many(iter(three)) == range(2_400, 3_000)
    assert store.append_many([]) == range(3_000, 3_000)
    assert store.append_many(np.zeros(0, tickbus.EVENT_DTYPE)) == range(3_000, 3_000)
    assert read(store) == three + three + three[::-1] + three + three


def test_batches_are_numpy_s_and_objects_come_as_lists(store: EventStore) -> None:
    store.append_many(events(3_000))
    store.append_many(["x", event(1), "y", "z"], topic=None)
    store.append_gap(2)
    found = list(store.read_batches(1_000))
    assert [first for first, _ in found] == [1_000, 3_000, 3_001, 3_002, 3_004]
    batches = [records for _, records in found]
    assert isinstance(batches[0], EventBatch)
    values = batches[0].to_numpy()["value"]
    assert (values == np.arange(1_000, 3_000) / 4).all()
    assert batches[3] == [
        Record(3_002, 0, None, "y", False),
        Record(3_003, 0, None, "z", False),
    ]
    assert batches[4] == Gap(2, True)


def test_a_reader_ends_where_the_log_does_and_reading_again_goes_on(store: EventStore) -> None:
    for round_ in range(50):
        first = store.append_many(events(round_ + 1)).start
        assert read(store, first) == events(round_ + 1)
        assert read(store, first + round_ + 1) == []


@pytest.mark.parametrize(
    ("stored", "given_back"),
    [
        (FILL, FILL),
        (BOOK, BOOK),
        (Health(3, "feed", "healthy"), Health(3, "feed", "healthy")),
        (Point(1, 2.5), {"x": 1, "y": 2.5}),
        (Note("n", ["a"]), {"text": "n", "tags": ["a"]}),
        ({"k": (1, None, True)}, {"k": [1, None, True]}),
        ([1, 2.5, "x", b"y"], [1, 2.5, "x", b"y"]),
        (frozenset({4}), [4]),
        ("text", "text"),
        (0, 0),
        (Decimal("1.50"), "1.50"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_typed_events_come_back_as_their_class_and_all_else_as_builtins(
    store: EventStore, stored: object, given_back: object
) -> None:
    store.append(stored, topic="objects.all")
    store.append_many([stored])
    (one, two) = store.read()
    assert one.event == two.event == given_back
    assert type(one.event) is type(given_back)
    assert (one.topic, two.topic) == ("objects.all", None)
    assert one.timestamp == getattr(given_back, "timestamp", 0)


def test_schemas_are_named_by_class_and_version(store: EventStore) -> None:
    store.append_many([FILL, Point(1, 2.0), {"a": 1}])
    found = store._reader(0).next_batch()
    assert found is not None
    _, rows = found
    assert isinstance(rows, list)
    assert [row[3:5] for row in rows] == [
        ("Fill", 1),
        (f"{__name__}.Point", 1),
        ("msgpack", 1),
    ]


def test_a_typed_event_with_fields_of_other_types_is_read_as_builtins(store: EventStore) -> None:
    wrong: Any = "not a number"
    store.append_many([Metrics(1, "risk", "var", wrong), FILL])
    first, second = read(store)
    assert first == {
        "event": "metrics",
        "timestamp": 1,
        "component": "risk",
        "name": "var",
        "value": wrong,
    }
    assert second == FILL


class _Opaque:
    pass


def _endless() -> list[object]:
    endless: list[object] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    "refused",
    [None, _Opaque(), object, 1 << 64, "\ud800", _endless(), Health(-1, "x", "healthy"), {1j: 2}],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("call", ["append", "append_many", "append_durable"])
def test_what_msgspec_cannot_encode_is_a_type_error_before_anything_is_stored(
    store: EventStore, refused: object, call: str
) -> None:
    store.append("before")
    several = [1, event(1), refused]
    argument = refused if call == "append" else several
    with pytest.raises(TypeError):
        getattr(store, call)(argument)
    assert store.stats().next_sequence == 1


def test_an_iterable_that_raises_stores_nothing(store: EventStore) -> None:
    def broken() -> Iterator[object]:
        yield event(1)
        raise LookupError("the feed broke")

    with pytest.raises(LookupError, match="the feed broke"):
        store.append_many(broken())
    assert store.stats().next_sequence == 0


@pytest.mark.parametrize("call", ["append", "append_many", "append_durable"])
def test_a_topic_is_for_objects_and_must_be_one(store: EventStore, call: str) -> None:
    append = getattr(store, call)
    for compact in (event(1), [event(1)], EventBatch(events(2)), EventBatch(events(2)).to_numpy()):
        with pytest.raises(TypeError):
            append(compact, topic="prices.BTCUSDT")
    for topic in ("", "a..b", "a b", "a.*", ">", "x" * 70_000):
        with pytest.raises(tickbus.ConfigError, match="topic"):
            append(["x"], topic=topic)
    assert store.stats().next_sequence == 0


def test_an_object_that_is_too_large_is_refused_and_the_log_goes_on(store: EventStore) -> None:
    with pytest.raises(tickbus.StoreError, match="at most"):
        store.append("x" * (1 << 20))
    large = "x" * (1_000_000)
    assert store.append(large) == 0
    assert read(store) == [large]


def test_an_event_may_append_to_the_log_while_it_is_encoded(store: EventStore) -> None:
    inner = iter(["inner"])

    @dataclasses.dataclass
    class Sly:
        text: str

    def each() -> Iterator[object]:
        for text in inner:
            store.append(text)
        yield Sly("outer")

    store.append_many(each())
    assert read(store) == ["inner", {"text": "outer"}]


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 600),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers(-(1 << 63), (1 << 64) - 1)
                | st.floats(allow_nan=False)
                | st.text()
                | st.binary(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=8,
            ).map(lambda value: {"value": value}),
        ),
        max_size=12,
    ),
    st.data(),
)
def test_whatever_is_appended_is_read_from_any_sequence_and_after_reopening(
    steps: list[Any], data: st.DataObject
) -> None:
    expected: list[Any] = []
    with tempfile.TemporaryDirectory() as path:
        with EventStore.open(path, segment_bytes=SMALL) as store:
            for step in steps:
                if isinstance(step, int):
                    assert store.append_many(events(step)).start == len(expected)
                    expected += events(step)
                else:
                    assert store.append(step) == len(expected)
                    expected.append(step)
            start = data.draw(st.integers(0, len(expected)))
            assert read(store, start) == expected[start:]
        with EventStore.open(path) as again:
            assert again.recovery.next_sequence == len(expected)
            assert read(again, start) == expected[start:]


# Opening, closing, numbers


def test_opening_again_goes_on_and_the_recovery_says_what_was_found(folder: Path) -> None:
    with EventStore.open(folder) as store:
        assert store.recovery == tickbus.Recovery(0, 0, 0, 0, 0, 0)
        store.append_many(events(10))
    with EventStore.open(folder) as again:
        assert again.recovery == tickbus.Recovery(0, 10, 1, 0, 0, 0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            again.recovery.cut_bytes = 1  # type: ignore[misc]
        assert again.append(event(0)) == 10
    assert EventStore.verify(folder).next_sequence == 11


def test_stats_and_the_durable_sequence_say_how_far_the_log_is(folder: Path) -> None:
    with EventStore.open(folder, durability="none") as store:
        assert store.durable_sequence is None
        assert store.stats() == tickbus.StoreStats(0, 0, None, 0, 0, None, 0, 0, 0, 0, 0.0, False)
        store.append_many(events(10))
        assert store.durable_sequence is None
        assert store.stats().next_sequence == 10
        store.sync()
        assert store.durable_sequence == store.stats().durable_sequence == 9
        store.seal()
        store.append(event(1))
        assert (store.durable_sequence, store.path, store.closed) == (9, folder, False)
    assert (store.durable_sequence, store.closed) == (10, True)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_each_durability_acknowledges_what_a_reader_finds_after_closing(
    folder: Path, durability: str
) -> None:
    with EventStore.open(folder, durability=durability) as store:
        store.append(event(0))
        if durability in ("always", "double"):
            assert store.durable_sequence == 0
        assert store.append_durable("x").wait() == 1
        assert store.durable_sequence == 1
    with EventStore.open(folder, read_only=True) as reader:
        assert read(reader) == [event(0), "x"]


@pytest.mark.parametrize(
    "settings_",
    [
        {"durability": "sometimes"},
        {"durability": "interval"},
        {"durability": "interval(0)"},
        {"durability": "interval(x)"},
        {"segment_bytes": 1_000},
        {"max_bytes": SMALL, "segment_bytes": SMALL},
    ],
    ids=str,
)
def test_settings_that_cannot_be_kept_are_config_errors(
    folder: Path, settings_: dict[str, Any]
) -> None:
    with pytest.raises(tickbus.ConfigError, match=r"must be|interval was 0"):
        EventStore.open(folder, **settings_)


@pytest.mark.parametrize("durability", [None, 1, b"group", ["group"]])
def test_a_durability_that_is_no_text_is_refused_with_those_that_there_are(
    folder: Path, durability: Any
) -> None:
    with pytest.raises(tickbus.ConfigError, match=r"durability was .*; it must be 'none', "):
        EventStore.open(folder, durability=durability)


def test_a_log_is_made_by_open_alone_and_whoever_calls_the_class_is_told(folder: Path) -> None:
    class Named(EventStore):
        name = "prices"

    for call in (lambda: EventStore(), lambda: EventStore(folder, durability="always")):
        with pytest.raises(TypeError, match=r"use EventStore\.open\(path\)"):
            call()
    with pytest.raises(TypeError, match=r"use Named\.open\(path\)"):
        Named(folder)
    assert not folder.exists()
    with Named.open(folder) as store:
        assert (type(store), store.name, store.append(1)) == (Named, "prices", 0)


def test_a_closed_log_says_so_and_closing_again_does_nothing(folder: Path) -> None:
    store = EventStore.open(folder)
    ticket = store.append_durable(event(1))
    store.close()
    store.close()
    assert (store.closed, ticket.wait(), repr(store)) == (True, 0, f"<EventStore {folder} closed>")
    calls: list[Callable[[], object]] = [
        lambda: store.append(event(1)),
        lambda: store.append_many([]),
        lambda: store.append_durable(1),
        lambda: store.append_gap(1),
        store.sync,
        store.seal,
        store.read,
        store.read_batches,
    ]
    for call in calls:
        with pytest.raises(tickbus.Closed):
            call()


def test_a_log_that_goes_without_being_closed_warns_and_is_closed_all_the_same(
    folder: Path,
) -> None:
    store = EventStore.open(folder, durability="none")
    store.append(event(1))
    with pytest.warns(ResourceWarning, match=r"unclosed <EventStore"):
        del store
    with EventStore.open(folder) as again:
        assert (read(again), again.recovery.scanned_bytes) == ([event(1)], 0)


def test_a_log_that_is_open_when_the_interpreter_ends_is_closed(folder: Path) -> None:
    child = run_child(f"""
        import tickbus
        store = tickbus.EventStore.open({str(folder)!r}, durability="none")
        store.append("kept")
        """)
    assert (child.returncode, child.stderr) == (0, "")
    with EventStore.open(folder) as again:
        assert (read(again), again.recovery.cut_bytes, again.recovery.scanned_bytes) == (
            ["kept"],
            0,
            0,
        )


def test_logs_and_tickets_refuse_pickling(store: EventStore) -> None:
    for refused in (store, store.append_durable(1)):
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(refused)


# Tickets


def test_a_ticket_waits_in_a_thread_and_may_be_asked_again(store: EventStore) -> None:
    for asked, last in ((event(1), 0), ([1, 2], 2), (EventBatch(events(3)), 5), ({"k": 1}, 6)):
        ticket = store.append_durable(asked)
        assert (ticket.sequence, ticket.wait(), ticket.wait(0.0), ticket.durable) == (
            last,
            last,
            last,
            True,
        )
    assert read(store) == [event(1), 1, 2, *events(3), {"k": 1}]


def test_a_ticket_for_nothing_is_refused(store: EventStore) -> None:
    for nothing in ([], (), EventBatch([])):
        with pytest.raises(tickbus.ConfigError, match="no events"):
            store.append_durable(nothing)


def test_a_ticket_that_is_not_durable_in_time_may_be_waited_for_again(folder: Path) -> None:
    with EventStore.open(folder, durability="none") as store:
        ticket = store.append_durable(event(1))
        assert not ticket.durable
        with pytest.raises(tickbus.SyncTimeout, match="up to 0"):
            ticket.wait(0.0)
        assert ticket.wait(60.0) == 0


def test_waiting_for_a_ticket_would_block_the_loop_and_is_refused(store: EventStore) -> None:
    async def main() -> int:
        ticket = store.append_durable(event(1))
        with pytest.raises(RuntimeError, match="await"):
            ticket.wait()
        return await ticket

    assert run(main) == 0


@pytest.mark.parametrize("durability", DURABILITIES)
def test_tasks_are_woken_when_their_records_are_durable(
    folder: Path, durability: str, any_loop: str
) -> None:
    async def main() -> list[int]:
        async def append(number: int) -> int:
            ticket = store.append_durable(event(number))
            last = await ticket
            durable = store.durable_sequence
            assert durable is not None
            assert durable >= last
            assert await ticket == last
            return last

        return await asyncio.gather(*(append(number) for number in range(40)))

    with EventStore.open(folder, durability=durability) as store:
        assert sorted(run(main)) == list(range(40))


def test_cancelling_an_await_loses_nothing(folder: Path, any_loop: str) -> None:
    async def main() -> None:
        ticket = store.append_durable(event(1))
        task = asyncio.create_task(_wait(ticket))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await ticket == 0

    with EventStore.open(folder, durability="interval(20)") as store:
        run(main)
        assert read(store) == [event(1)]


async def _wait(ticket: tickbus.StoreTicket) -> int:
    return await ticket


def test_a_task_that_always_finds_its_records_durable_lets_others_run(folder: Path) -> None:
    async def main() -> None:
        ticket = store.append_durable(event(1))
        await ticket
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        for _ in range(2_000):
            await ticket
        assert turns >= 7
        counting.cancel()

    with EventStore.open(folder) as store:
        run(main)


def test_threads_append_and_wait_while_another_reads(store: EventStore) -> None:
    def write(writer: int) -> None:
        for number in range(40):
            last = store.append_durable([event(number), {"writer": writer, "n": number}]).wait()
            durable = store.durable_sequence
            assert durable is not None
            assert durable >= last

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    seen: list[Any] = []
    while len(seen) < 240:
        seen += read(store, len(seen))
    for thread in threads:
        thread.join()
    for writer in range(3):
        of_it = [e for e in seen if isinstance(e, dict) and e["writer"] == writer]
        assert [e["n"] for e in of_it] == list(range(40))
    assert seen[::2] == [event(e["n"]) for e in seen[1::2]]


# What goes wrong


def test_a_full_log_says_how_many_were_stored_and_acknowledges_nothing_more(
    folder: Path,
) -> None:
    store = EventStore.open(folder, segment_bytes=SMALL, max_bytes=2 * SMALL)
    assert store.append_durable({"first": 1}).wait() == 0
    several = [*("x" * 30_000 for _ in range(8)), event(1)]
    with pytest.raises(tickbus.StoreFull, match="max_bytes") as full:
        store.append_many(several)
    accepted = full.value.accepted
    assert accepted is not None
    assert 0 < accepted < len(several)
    copied = pickle.loads(pickle.dumps(full.value))
    assert (type(copied), copied.accepted) == (tickbus.StoreFull, accepted)
    assert store.stats().next_sequence == 1 + accepted
    stored = [{"first": 1}, *several[:accepted]]
    assert read(store) == stored
    # What was taken has room, and nothing more is taken.
    store.sync()
    assert store.durable_sequence == accepted
    with pytest.raises(tickbus.StoreFull) as refused:
        store.append_durable(several).wait(60.0)
    assert refused.value.accepted is not None
    store.close()
    with EventStore.open(folder) as again:
        stored += several[: refused.value.accepted]
        assert read(again) == stored


def test_a_failed_write_is_an_io_error_then_the_log_is_poisoned_and_recovers(
    folder: Path,
) -> None:
    child = run_child(f"""
        import asyncio, errno, pickle, resource
        import tickbus
        from tickbus import Event, EventBatch

        store = tickbus.EventStore.open({str(folder)!r}, segment_bytes=262144)
        assert store.append_durable([1, 2, 3]).wait() == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            store.append_many(EventBatch([Event(1, 0)] * 2_500))
        except tickbus.StoreIO as error:
            assert error.errno == errno.EFBIG, error.errno
            assert isinstance(error, OSError)
            copied = pickle.loads(pickle.dumps(error))
            assert (type(copied), copied.errno, str(copied)) == (
                tickbus.StoreIO, error.errno, str(error))
        else:
            raise AssertionError("it was written")
        for call in (lambda: store.append(4), lambda: store.append_durable(4), store.seal):
            try:
                call()
            except tickbus.Poisoned as error:
                assert "open the log again" in str(error)
            else:
                raise AssertionError("it is poisoned")
        assert store.durable_sequence == 2
        try:
            store.close()
        except tickbus.Poisoned:
            print("poisoned")
        assert store.closed
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        """)
    assert (child.returncode, child.stdout, child.stderr) == (0, "poisoned\n", "")
    with EventStore.open(folder) as again:
        assert read(again) == [1, 2, 3]
        assert again.append(4) == 3


def test_without_msgspec_objects_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tickbus\[events\]'") as missing:
        records._msgspec.__wrapped__()
    assert missing.value.name == "msgspec"


def test_those_that_wait_are_told_when_a_write_fails(folder: Path) -> None:
    child = run_child(f"""
        import asyncio, resource, threading
        import tickbus
        from tickbus import Event, EventBatch

        store = tickbus.EventStore.open({str(folder)!r}, durability="none", segment_bytes=65536)
        store.append("durable")
        store.sync()
        tickets = [store.append_durable("x" * 30_000) for _ in range(2)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        async def wait(ticket):
            return await ticket

        async def main():
            waits = [asyncio.ensure_future(wait(ticket)) for ticket in tickets]
            thread = asyncio.to_thread(tickets[1].wait, 60.0)
            told = await asyncio.gather(*waits, thread, return_exceptions=True)
            return told, await asyncio.gather(wait(tickets[0]), return_exceptions=True)

        told, late = asyncio.run(main())
        assert all(isinstance(e, (tickbus.StoreIO, tickbus.Poisoned)) for e in told), told
        assert isinstance(late[0], tickbus.Poisoned), late
        assert store.durable_sequence == 0
        try:
            store.close()
        except tickbus.Poisoned:
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        """)
    assert (child.returncode, child.stderr) == (0, "")


def test_events_that_lie_together_come_together_and_nothing_behind_them_is_lost(
    store: EventStore,
) -> None:
    for number in range(9):
        store.append_many(events(1_000)[number * 100 :])
    store.append_many([{"n": 1}, {"n": 2}])
    store.append_many(events(3))
    store.append_gap(5)
    store.sync()
    found = list(store.read_batches())
    sizes = [
        (first, len(records) if isinstance(records, (EventBatch, list)) else records)
        for first, records in found
    ]
    # 1,000, 900, 800, ... events; a batch ends behind the frame that makes it long enough.
    assert sizes == [(0, 4_500), (4_500, 900), (5_400, 2), (5_402, 3), (5_405, Gap(5, True))]
    together = [event for _, batch in found[:2] for event in batch]
    assert together == [event for number in range(9) for event in events(1_000)[number * 100 :]]


def test_what_is_before_damage_is_given_before_it_is_told(folder: Path) -> None:
    with EventStore.open(folder) as store:
        for number in range(3):
            store.append_many(events(900)[number * 300 :])
            store.sync()
    (segment,) = folder.glob("*.elog")
    content = bytearray(segment.read_bytes())
    content[content.rfind(event(899).to_bytes())] ^= 1
    segment.write_bytes(content)
    with EventStore.open(folder, read_only=True) as reader:
        batches = reader.read_batches()
        first, found = next(batches)
        assert (first, len(found)) == (0, 900 + 600)
        with pytest.raises(tickbus.Corrupt) as corrupt:
            next(batches)
        assert corrupt.value.sequence == 1_500


def test_damage_is_told_with_its_place_and_never_stepped_over(folder: Path) -> None:
    with EventStore.open(folder, segment_bytes=SMALL) as store:
        store.append_many(events(3_000))
        store.seal()
        store.append_many(events(4_000)[3_000:])
        assert store.verify().next_sequence == 4_000
    damaged = folder / f"{0:020}.elog"
    content = bytearray(damaged.read_bytes())
    place = content.find(event(100).to_bytes())
    content[place] ^= 1
    damaged.write_bytes(content)
    with EventStore.open(folder, read_only=True) as reader:
        readings: list[Callable[[], object]] = [
            reader.verify,
            lambda: EventStore.verify(folder),
            lambda: EventStore.verify(str(folder)),
            lambda: list(reader.read()),
            lambda: list(reader.read_batches()),
        ]
        for reading in readings:
            with pytest.raises(tickbus.Corrupt, match=damaged.name) as corrupt:
                reading()
            error = corrupt.value
            assert (error.segment, error.sequence) == (damaged.name, 0)
            # The frame of the event, behind the header of the segment.
            assert 4_096 <= error.offset < place
            assert f"damaged at byte {error.offset}:" in str(error)
            copied = pickle.loads(pickle.dumps(error))
            assert vars(copied) == vars(error)
            assert str(copied) == str(error)
        assert read(reader, 3_000) == events(4_000)[3_000:]


def _crc32c(content: bytes) -> int:
    crc = 0xFFFF_FFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF


def test_a_log_of_a_later_format_is_refused(folder: Path) -> None:
    with EventStore.open(folder) as store:
        store.append(1)
    segment = folder / f"{0:020}.elog"
    content = bytearray(segment.read_bytes())
    assert struct.unpack_from("<I", content, 4_092) == (_crc32c(content[:4_092]),)
    struct.pack_into("<H", content, 8, 2)
    struct.pack_into("<I", content, 4_092, _crc32c(content[:4_092]))
    segment.write_bytes(content)
    for refused in (
        lambda: EventStore.open(folder),
        lambda: EventStore.open(folder, read_only=True),
        lambda: EventStore.verify(folder),
    ):
        with pytest.raises(tickbus.VersionError, match="format 2"):
            refused()


def test_a_folder_that_is_not_there_or_holds_no_log_is_not_read(tmp_path: Path) -> None:
    for refused in (
        lambda path: EventStore.open(path, read_only=True),
        lambda path: EventStore.verify(path),
    ):
        with pytest.raises(tickbus.StoreIO) as missing:
            refused(tmp_path / "missing")
        assert missing.value.errno == errno.ENOENT
        with pytest.raises(tickbus.StoreIO, match="NUL byte"):
            refused("\0")
        with pytest.raises(tickbus.StoreError, match="holds no log"):
            refused(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(tickbus.StoreIO) as no_folder:
        EventStore.open(tmp_path / "file")
    assert no_folder.value.errno == errno.EEXIST


def test_a_folder_that_may_not_be_read_is_an_error_of_the_log(tmp_path: Path) -> None:
    EventStore.open(tmp_path).close()
    tmp_path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65_534)  # Who may read everything is somebody else for a moment.
        for refused in (
            lambda: EventStore.open(tmp_path, read_only=True),
            lambda: EventStore.verify(tmp_path),
        ):
            with pytest.raises(tickbus.StoreIO) as denied:
                refused()
            assert denied.value.errno == errno.EACCES
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


# Readers and writers


def test_a_log_that_is_opened_to_read_only_refuses_to_be_written(
    store: EventStore, folder: Path
) -> None:
    store.append_durable(event(1)).wait()
    store.seal()
    with EventStore.open(folder, read_only=True) as reader:
        writings: list[Callable[[], object]] = [
            lambda: reader.append(1),
            lambda: reader.append_many([1]),
            lambda: reader.append_durable(1),
            lambda: reader.append_gap(1),
            reader.sync,
            reader.seal,
        ]
        for writing in writings:
            with pytest.raises(tickbus.ReadOnly, match="read_only=True"):
                writing()
        assert (reader.read_only, store.read_only) == (True, False)
        assert repr(reader) == f"<EventStore {folder} read_only>"
        assert reader.durable_sequence == 0
        assert reader.recovery.next_sequence == 1
        store.append(event(2))
        store.seal()
        assert (reader.durable_sequence, reader.stats().segments) == (1, 2)
        assert read(reader) == [event(1), event(2)]
    assert reader.closed
    with pytest.raises(tickbus.Closed):
        reader.read()


def test_a_second_writer_is_refused_and_named_here_and_in_another_process(
    store: EventStore, folder: Path
) -> None:
    with pytest.raises(tickbus.AlreadyOpen, match=f"process {os.getpid()}"):
        EventStore.open(folder)
    script = f"""
        import tickbus
        try:
            tickbus.EventStore.open({str(folder)!r})
        except tickbus.AlreadyOpen as error:
            print(error)
        """
    child = run_child(script)
    assert f"process {os.getpid()}" in child.stdout
    store.close()
    child = run_child(script.replace(")\n        except", ").close()\n        except"))
    assert (child.returncode, child.stdout) == (0, "")


def test_names_are_those_of_the_writer_whatever_their_numbers_are_here(folder: Path) -> None:
    names = [f"STORE{number}" for number in range(5)]
    for name in names:
        tickbus.symbols.intern(name)
    child = run_child(f"""
        import tickbus
        from tickbus import Event, EventType
        EventType.register("store_test_type", 26)
        for number in range(300):
            tickbus.symbols.intern(f"other{{number}}")
        with tickbus.EventStore.open({str(folder)!r}) as store:
            for number, name in enumerate(reversed({names!r})):
                event = Event(number, "store_test_type", 0, f"venue{{name}}", name)
                store.append(event)
                assert event.symbol_id > 300
                store.append({{"n": number}}, topic=f"t.{{name}}")
        """)
    assert (child.returncode, child.stderr) == (0, "")
    with EventStore.open(folder, read_only=True) as reader:
        records = list(reader.read())
    found = [record.event for record in records[::2]]
    assert [each.symbol for each in found] == names[::-1]
    assert [each.source for each in found] == [f"venue{name}" for name in names[::-1]]
    assert {each.symbol_id for each in found} == {tickbus.symbols.find(name) for name in names}
    assert [record.topic for record in records[::2]] == [
        f"store_test_type.{name}" for name in names[::-1]
    ]
    assert [record.topic for record in records[1::2]] == [f"t.{name}" for name in names[::-1]]


def test_types_that_contradict_those_of_this_process_are_told(folder: Path) -> None:
    run_child(f"""
        import tickbus
        tickbus.EventType.register("store_contradiction", 27)
        with tickbus.EventStore.open({str(folder)!r}) as store:
            store.append(tickbus.Event(0, "store_contradiction"))
        """)
    EventType.register("store_says_otherwise", 27)
    with (
        EventStore.open(folder, read_only=True) as reader,
        pytest.raises(tickbus.ConfigError, match="store_contradiction"),
    ):
        list(reader.read())


# Processes that end


_WRITER = """
import sys
import tickbus
with tickbus.EventStore.open(sys.argv[1], segment_bytes=65536) as store:
    number = store.recovery.next_sequence
    while True:
        last = store.append_durable([number + n for n in range(number % 7 + 1)]).wait()
        print(last, flush=True)
        number = last + 1
"""


@pytest.mark.parametrize("acknowledged", [1, 2, 5, 40, 150])
def test_killing_the_writer_loses_nothing_that_it_acknowledged(
    folder: Path, acknowledged: int
) -> None:
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, folder], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            told = [int(next(writer.stdout)) for _ in range(acknowledged)]
            writer.send_signal(signal.SIGKILL)
            # What was still in the pipe was acknowledged too.
            told += [int(line) for line in writer.stdout if line.endswith("\n")]
        with EventStore.open(folder) as store:
            found = read(store)
        assert found == list(range(len(found)))
        assert len(found) > max(told)


_FORK = """
import os, sys, warnings
import tickbus

def fork():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()

"""


def _run_forking(script: str) -> subprocess.CompletedProcess[str]:
    return run_child(_FORK + textwrap.dedent(script))


def test_after_fork_every_call_raises_forked_error_and_the_child_writes_nothing(
    folder: Path,
) -> None:
    child = _run_forking(f"""
        folder = {str(folder)!r}
        store = tickbus.EventStore.open(folder)
        reader = tickbus.EventStore.open(folder, read_only=True)
        store.append_many(range(3))
        reading = store.read()
        next(reading)
        ticket = store.append_durable(3)
        process = fork()
        if process == 0:
            calls = [
                lambda: store.append(1), lambda: store.append_many([1]),
                lambda: store.append_durable(1), lambda: store.append_gap(1),
                store.sync, store.seal, store.close, store.stats, store.read,
                store.read_batches, lambda: store.durable_sequence,
                ticket.wait, ticket.__await__, lambda: ticket.sequence, lambda: ticket.durable,
                reader.read, reader.stats, reader.close, lambda: reader.append(1),
            ]
            for place, call in enumerate(calls):
                try:
                    call()
                except tickbus.ForkedError:
                    continue
                print("no error", place, flush=True)
                os._exit(1)
            assert "another process" in repr(store) and "another process" in repr(ticket)
            with store:
                pass
            try:
                tickbus.EventStore.open(folder)
            except tickbus.AlreadyOpen:
                pass
            else:
                os._exit(2)
            del store, reader, ticket
            sys.exit(0)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert ticket.wait() == 3
        assert store.append(4) == 4
        reader.close()
        store.close()
        """)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
    with EventStore.open(folder) as store:
        assert read(store) == [0, 1, 2, 3, 4]


def test_a_child_that_lives_on_does_not_hold_the_log_of_its_parent(folder: Path) -> None:
    script = """
        store = tickbus.EventStore.open(sys.argv[1])
        store.append_durable(1).wait()
        if fork() == 0:
            print("lives on", flush=True)
            sys.stdin.read()
            os._exit(0)
        signal.pause()
        """
    script = _FORK + "import signal\n" + textwrap.dedent(script)
    with subprocess.Popen(
        [sys.executable, "-c", script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert next(parent.stdout) == "lives on\n"
        with pytest.raises(tickbus.AlreadyOpen):
            EventStore.open(folder)
        parent.kill()
        # Not `parent.wait()`, which would close what the child waits for.
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        with EventStore.open(folder) as store:
            assert read(store) == [1]


def test_a_log_may_be_closed_and_opened_again_while_a_child_lives_on(folder: Path) -> None:
    child = _run_forking(f"""
        store = tickbus.EventStore.open({str(folder)!r})
        until, end = os.pipe()
        process = fork()
        if process == 0:
            os.close(end)
            os.read(until, 1)
            os._exit(0)
        store.close()
        with tickbus.EventStore.open({str(folder)!r}) as again:
            again.append(1)
        os.close(end)
        os.waitpid(process, 0)
        """)
    assert (child.returncode, child.stderr) == (0, "")


def _segments(store: EventStore, count: int) -> None:
    for _ in range(count):
        store.append_many(events(100))
        store.seal()


def test_retaining_keeps_what_was_asked_for_and_readers_are_told_what_is_gone(
    folder: Path,
) -> None:
    with EventStore.open(folder) as store:
        _segments(store, 5)
        assert store.retain() == tickbus.Retired(0, 0, 0)
        assert store.retain(age=3600.0).segments == 0
        retired = store.retain(count=250)
        assert (retired.segments, retired.records) == (2, 200)
        assert store.stats().oldest_sequence == 200
        assert next(store.read()).event == Gap(200, True)
        assert store.retain(size=store.stats().bytes).segments == 0
        assert store.retain(size=0).records == 200
    with EventStore.open(folder) as store:
        assert store.recovery.oldest_sequence == 400
        assert len(list(store.read(400))) == 100
        assert EventStore.verify(folder).oldest_sequence == 400


def test_a_compressed_log_reads_as_before_and_takes_less_room(folder: Path) -> None:
    with EventStore.open(folder) as store:
        _segments(store, 3)
        store.append_many([{"price": number} for number in range(50)])
        store.seal()
        before = list(store.read())
        assert store.compress(older_than=3600.0) == tickbus.Compression(0, 0, 0)
        compression = store.compress()
        assert compression.segments == 4
        assert compression.bytes_after < compression.bytes_before / 2
        assert store.stats().bytes == compression.bytes_after
        assert list(store.read()) == before
        with pytest.raises(tickbus.ConfigError):
            store.compress(older_than=-1.0)
    assert [path.suffix for path in folder.glob("*.elog*")] == [".zst"] * 4
    with EventStore.open(folder, read_only=True) as reader:
        assert list(reader.read()) == before
        with pytest.raises(tickbus.ReadOnly):
            reader.compress()
