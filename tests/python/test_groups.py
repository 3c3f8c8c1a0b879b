"""Groups of a log: what was committed is not given again, all else is, to one at a time."""

from __future__ import annotations

import asyncio
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tickbus
from support import run
from tickbus import (
    Closed,
    ConfigError,
    Event,
    EventBatch,
    EventStore,
    EventType,
    Gap,
    GroupBatch,
    Lagged,
    ReceiveTimeout,
    Record,
    StaleToken,
)

PATIENCE = 60.0
"""Seconds that no test reaches."""


def fill(store: EventStore, count: int) -> None:
    first = store.stats().next_sequence
    store.append_many([{"n": first + place} for place in range(count)])
    store.sync()


def numbers(batch: GroupBatch) -> list[int]:
    return [record.event["n"] for record in batch]


def test_records_come_as_the_log_holds_them(store: EventStore) -> None:
    store.append(Event(5, EventType.PriceUpdate, symbol="BTCUSDT", value=1.0))
    store.append({"a": 1}, topic="notes.a")
    store.append_gap(9)
    store.sync()
    group = store.group("readers")
    batch = group.fetch()
    assert (batch.sequences, len(batch), batch.attempt) == (range(3), 3, 1)
    assert list(batch) == [
        Record(
            0,
            5,
            "price_update.BTCUSDT",
            Event(5, EventType.PriceUpdate, symbol="BTCUSDT", value=1.0),
            False,
        ),
        Record(1, 0, "notes.a", {"a": 1}, False),
        Record(2, 0, None, Gap(9, True), False),
    ]
    batch.give_back()
    again = group.fetch()
    kinds = [type(records) for _, records in again.batches()]
    assert (again.attempt, kinds) == (2, [EventBatch, list, Gap])
    assert repr(again) == "<GroupBatch range(0, 3) attempt=2>"
    assert repr(group) == "<Group readers>"


def test_a_group_goes_on_where_it_had_committed_when_the_log_is_opened_again(
    tmp_path: Path,
) -> None:
    with EventStore.open(tmp_path) as store:
        fill(store, 50)
        group = store.group("readers")
        group.fetch(20).commit()
        assert numbers(group.fetch(10)) == list(range(20, 30))
        group.fetch(10).commit()
        stats = group.stats()
        assert (stats.cursor, stats.lag, stats.in_flight) == (20, 20, 10)
        assert store.groups() == [stats]
    with EventStore.open(tmp_path) as store:
        (stats,) = store.groups()
        assert (stats.name, stats.cursor, stats.lag, stats.in_flight) == ("readers", 20, 20, 0)
        group = store.group("readers", start="newest")
        assert numbers(group.fetch()) == list(range(20, 30)), "where it begins counts once"
        assert numbers(group.fetch()) == list(range(40, 50))
        assert group.try_fetch() is None


@pytest.mark.parametrize(("start", "first"), [("oldest", 0), ("newest", 10), (7, 7)])
def test_a_new_group_begins_where_it_is_told_to(
    store: EventStore, start: str | int, first: int
) -> None:
    fill(store, 10)
    group = store.group("readers", start=start)
    fill(store, 2)
    assert group.fetch().sequences == range(first, 12)


def test_consumers_of_a_group_share_its_records_and_groups_do_not(store: EventStore) -> None:
    fill(store, 100)
    one, two, other = store.group("shared"), store.group("shared"), store.group("other")
    assert [one.fetch(40).sequences, two.fetch(40).sequences] == [range(40), range(40, 80)]
    assert other.fetch(100).sequences == range(100)


def test_threads_that_share_a_group_commit_each_record_once(store: EventStore) -> None:
    group = store.group("shared", max_in_flight=64)
    committed: list[int] = []
    lock = threading.Lock()

    def consume() -> None:
        for batch in store.group("shared", max_in_flight=64):
            found = numbers(batch)
            batch.commit()
            with lock:
                committed.extend(found)
                if len(committed) == 2_000:
                    done.set()

    done = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        consumers = [pool.submit(consume) for _ in range(4)]
        for _ in range(20):
            fill(store, 100)
        assert done.wait(PATIENCE)
        assert group.stats().lag == 0
        store.close()
        for consumer in consumers:
            consumer.result(PATIENCE)
    assert sorted(committed) == list(range(2_000))


def test_a_lease_that_ends_wakes_another_consumer_and_the_late_commit_is_refused(
    store: EventStore,
) -> None:
    fill(store, 5)
    group = store.group("readers", lease=0.001)
    slow = group.fetch()
    again = group.fetch(timeout=PATIENCE)
    assert (again.sequences, again.attempt) == (range(5), 2)
    with pytest.raises(StaleToken, match="raise the lease"):
        slow.commit()
    with pytest.raises(StaleToken):
        slow.give_back()
    with pytest.raises(StaleToken):
        run(slow.commit_async)
    assert group.stats().redelivered == 5


def test_a_group_with_its_fill_waits_for_a_commit_and_counts_that(store: EventStore) -> None:
    fill(store, 10)
    group = store.group("readers", max_in_flight=6)
    first = group.fetch(4)
    assert group.fetch(4).sequences == range(4, 6)
    assert group.try_fetch() is None
    with pytest.raises(ReceiveTimeout, match=r"within 0\.001 s"):
        group.fetch(timeout=0.001)
    assert group.stats().stalled == 1
    first.commit()
    assert group.fetch().sequences == range(6, 10)


def test_only_durable_records_are_given(tmp_path: Path) -> None:
    with EventStore.open(tmp_path, durability="none") as store:
        group = store.group("readers")
        store.append({"n": 0})
        assert group.try_fetch() is None
        store.sync()
        assert numbers(group.fetch()) == [0]


def test_tasks_wait_without_a_thread_and_lose_nothing_when_cancelled(store: EventStore) -> None:
    async def main() -> None:
        group = store.group("readers")
        cancelled = asyncio.create_task(group.fetch_async())
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        waiting = asyncio.create_task(group.fetch_async(3))
        await asyncio.sleep(0)
        ticket = store.append_durable([{"n": 0}, {"n": 1}])
        batch = await waiting
        await ticket
        assert numbers(batch) == [0, 1]
        await batch.commit_async()
        assert group.stats().cursor == 2
        with pytest.raises(RuntimeError, match="fetch_async"):
            group.fetch()

    asyncio.run(main())


def test_async_for_ends_with_the_log(store: EventStore) -> None:
    seen: list[int] = []

    async def read() -> None:
        async for batch in store.group("readers"):
            seen.extend(numbers(batch))
            await batch.commit_async()
            if len(seen) == 30:
                await asyncio.to_thread(store.close)

    async def main() -> None:
        reading = asyncio.create_task(read())
        for _ in range(3):
            await asyncio.to_thread(fill, store, 10)
        await reading

    asyncio.run(main())
    assert seen == list(range(30))


def test_a_group_that_nobody_uses_expires_and_goes_on_when_it_returns(store: EventStore) -> None:
    fill(store, 3)
    group = store.group("readers", max_idle=0.001)
    other = store.group("watcher", lease=0.01)
    held = other.fetch()
    while not group.stats().expired:  # each round is a lease, not a moment
        assert other.fetch(timeout=PATIENCE).attempt > held.attempt
    (stats,) = [stats for stats in store.groups() if stats.name == "readers"]
    assert stats.expired
    assert numbers(group.fetch(timeout=PATIENCE)) == [0, 1, 2], "nothing was removed meanwhile"
    assert group.stats().expirations >= 1


def test_a_group_that_had_expired_is_told_what_is_gone(store: EventStore) -> None:
    fill(store, 3_000)
    group = store.group("readers", max_idle=0.001)
    while not group.stats().expired:
        store.append_durable({"n": -1}).wait()
    while not (removed := store.retain(count=100)).records:
        store.append_durable({"n": -1}).wait()  # what has expired is durable a moment later
    with pytest.raises(Lagged) as lagged:
        group.fetch(timeout=PATIENCE)
    assert lagged.value.missed == removed.records == store.stats().oldest_sequence
    assert group.fetch(1).sequences == range(removed.records, removed.records + 1)


def test_what_a_group_has_not_committed_is_not_removed(store: EventStore) -> None:
    fill(store, 3_000)
    group = store.group("readers")
    batch = group.fetch(10)
    assert store.retain(count=1).records == 0
    batch.commit()
    group.fetch(2_900).commit()
    removed = store.retain(count=1).records
    assert 0 < removed <= 2_910


def test_a_group_that_is_removed_is_closed(store: EventStore) -> None:
    fill(store, 3)
    group = store.group("readers")
    batch = group.fetch()
    assert store.remove_group("readers")
    assert not store.remove_group("readers")
    with pytest.raises(Closed, match='"readers" was removed'):
        group.fetch()
    with pytest.raises(Closed):
        group.stats()
    with pytest.raises(StaleToken):
        batch.commit()
    assert list(group) == []
    assert store.groups() == []
    assert store.group("readers").fetch().attempt == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "first"}, "'oldest', 'newest' or a sequence"),
        ({"start": -1}, "'oldest', 'newest' or a sequence"),
        ({"start": 1}, "start was 1; the log ends before 0"),
        ({"lease": 0.0}, "the lease was 0"),
        ({"lease": -1.0}, "lease was -1"),
        ({"max_idle": 0.0}, "max_idle was 0"),
        ({"max_in_flight": 0}, "max_in_flight was 0"),
        ({"name": ""}, "from 1 to 255"),
    ],
)
def test_what_a_group_cannot_keep_is_refused(
    store: EventStore, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        store.group(**{"name": "readers"} | arguments)


def test_a_group_belongs_to_the_process_that_writes(store: EventStore) -> None:
    fill(store, 1)
    group = store.group("readers")
    for whose in (group._core, group.fetch()._core):
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(whose)
    with EventStore.open(store.path, read_only=True) as reader:
        with pytest.raises(tickbus.ReadOnly):
            reader.group("readers")
        with pytest.raises(tickbus.ReadOnly):
            reader.groups()
    store.close()
    with pytest.raises(Closed):
        group.fetch()
    with pytest.raises(Closed):
        store.group("readers")


def test_records_of_a_process_that_was_killed_are_given_again(tmp_path: Path) -> None:
    script = """
    import sys
    from tickbus import EventStore

    store = EventStore.open(sys.argv[1])
    store.append_many([{"n": n} for n in range(30)])
    store.sync()
    group = store.group("readers")
    group.fetch(10).commit()
    group.fetch(10)
    print("read", flush=True)
    sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "read\n"
        child.send_signal(signal.SIGKILL)
    with EventStore.open(tmp_path) as store:
        assert numbers(store.group("readers").fetch()) == list(range(10, 30))
