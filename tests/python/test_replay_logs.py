"""Replays of logs and captures: the same again, to everybody, at its pace, and nobody else's."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tickbus
from support import MakeBus, run, run_child
from tickbus import (
    Closed,
    ConfigError,
    Event,
    EventBatch,
    EventBus,
    EventStore,
    EventSystem,
    EventType,
    Gap,
    Lagged,
    Replay,
    ReplayRefused,
    VirtualClock,
)
from tickbus.events import Health
from tickbus.recorder import EventRecorder
from tickbus.typed import TypedEventBus

_SECOND = 1_000_000_000


def events(count: int, first: int = 0) -> list[Event]:
    return [
        Event(1_000 + n, n % 3, symbol=f"S{n % 5}", source_id="here", value=n / 4, metadata=n)
        for n in range(first, first + count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "log") as opened:
        yield opened


def read_all(bus: EventBus[Any] | EventSystem) -> Callable[[], list[Any]]:
    """Subscribes, and returns what waits for all events up to the end of the replay."""
    subscription = bus.subscribe()
    received: list[Any] = []

    def read() -> None:
        with subscription:
            while not (received and is_end(received[-1])):
                received.extend(subscription.recv_many(100))

    thread = threading.Thread(target=read)
    thread.start()

    def wait() -> list[Any]:
        thread.join()
        return received[:-1]

    return wait


def is_end(event: object) -> bool:
    return isinstance(event, Event) and event.event_type == EventType.ReplayEnded


def unflagged(received: list[Any]) -> list[Any]:
    return [
        event.replace(priority=event.priority) if isinstance(event, Event) else event
        for event in received
    ]


_TIMES = st.integers(0, 2_000)
_RECORDS = st.one_of(
    st.builds(
        lambda time, code, symbol, value: Event(time, code, symbol=symbol, value=value),
        _TIMES,
        st.integers(0, 3),
        st.sampled_from([None, "A", "B.C"]),
        st.floats(allow_nan=False),
    ),
    st.dictionaries(st.text(max_size=3), st.integers(-9, 9), max_size=2),
    st.builds(Gap, st.integers(1, 9), st.just(True)),
)


def test_a_replay_is_begun_once_and_says_what_it_is(store: EventStore) -> None:
    store.append_many(events(3))
    with Replay(store) as never:
        assert repr(never) == f"<Replay of {store!r} ready>"
    with EventBus[Any]() as bus:
        with pytest.raises(Closed, match="the replay is over"):
            never.into(bus)
        replay = Replay(store).into(bus)
        with pytest.raises(ConfigError, match="this replay has begun already"):
            replay.into(bus)
        replay.wait()


def test_a_cancelled_wait_leaves_the_replay_as_it_is(store: EventStore) -> None:
    store.append_many([Event(n * _SECOND, 0) for n in range(1, 4)])

    async def main() -> None:
        with EventBus[Any]() as bus, Replay(store).into(bus, speed=1.0) as replay:
            waiting = asyncio.ensure_future(replay._wait_async())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert replay.state == "running"
            replay.stop()
            assert (await replay).state == "stopped"

    asyncio.run(main())


def test_a_process_that_ends_stops_its_replays(tmp_path: Path) -> None:
    child = run_child(f"""
        from tickbus import Event, EventBus, EventStore, Replay

        store = EventStore.open({str(tmp_path / "log")!r})
        store.append_many([Event(n * 3_600_000_000_000, 0) for n in range(1, 4)])
        bus = EventBus()
        replay = Replay(store).into(bus, speed=1.0, longest_gap=1e9)
        print(replay.state)
        """)
    assert (child.returncode, child.stdout, child.stderr) == (0, "running\n", "")


def test_a_store_gives_a_replay_of_what_it_has(store: EventStore) -> None:
    store.append_many(events(3))
    clock = VirtualClock()
    with EventBus[Any]() as bus:
        read = read_all(bus)
        replay = store.replay(clock=clock).into(bus)
        assert replay.wait().replayed == 3
        assert [event.metadata for event in read()] == [0, 1, 2]
    assert replay.clock is clock


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=st.lists(_RECORDS, max_size=60))
def test_two_replays_give_the_same_digest_order_and_results(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    with EventStore.open(folder, segment_bytes=65_536) as store:
        for record in records:
            if isinstance(record, Gap):
                store.append_gap(*record)
            else:
                store.append(record)
        digests, results = set(), []
        for make_bus in (EventBus, lambda: EventBus("ring", 16), lambda: EventBus("broadcast", 16)):
            with make_bus() as bus:
                read = read_all(bus)
                replay = Replay(store).into(bus)
                results.append(unflagged(read()))
                progress = replay.wait()
                digests.add(replay.digest)
        store.sync()
        from_another_process = Replay(folder)
        batches = list(from_another_process.batches())
        digests.add(from_another_process.digest)
    expected = [record for record in records if not isinstance(record, Gap)]
    assert results == [expected] * 3
    assert len(digests) == 1
    assert sum(map(len, batches)) == progress.replayed == len(expected)
    assert progress.missed == sum(gap.missed for gap in records if isinstance(gap, Gap))


def test_the_digest_is_that_of_contents_and_order_alone(tmp_path: Path) -> None:
    def digest(path: Path, all_events: list[Any], **options: Any) -> str:
        with EventStore.open(path, segment_bytes=65_536) as store:
            for start in range(0, len(all_events), options.pop("together", 1_000)):
                store.append_many(all_events[start : start + 1_000])
        replay = Replay(path)
        assert sum(map(len, replay.batches(**options))) == len(all_events)
        return replay.digest

    some = events(5_000)
    first = digest(tmp_path / "1", some)
    assert digest(tmp_path / "2", some, together=1_000, speed=1e9) == first
    assert digest(tmp_path / "3", some[::-1]) != first
    assert digest(tmp_path / "4", [*some[:-1], some[-1].replace(value=0.5)]) != first


def test_a_replay_into_a_system_is_in_order_and_flagged(store: EventStore) -> None:
    store.append_many(events(50_000))
    with EventSystem(normal_capacity=256) as system:
        read = read_all(system)
        with Replay(store).into(system) as replay:
            received = read()
            progress = replay.wait()
        assert unflagged(received) == events(50_000)
        assert all(event.replayed for event in received)
        assert not any(event.replayed for event in unflagged(received))
        assert (progress.state, progress.replayed, progress.sequence) == ("ended", 50_000, 50_000)
        assert system.total_events == 50_001
        again = Replay(store).into(system, types="price_update", symbols=["S0", "S3"])
        assert again.wait().replayed == sum(n % 3 == 0 and n % 5 in (0, 3) for n in range(50_000))


def test_the_end_tells_the_time_and_how_many(store: EventStore) -> None:
    store.append_many(events(3))
    with EventBus() as bus, bus.subscribe("replay_ended", envelope=True) as ends:
        Replay(store).into(bus).wait()
        end = ends.recv()
    assert (end.topic, end.replayed) == ("replay_ended", True)
    assert (end.event.timestamp, end.event.metadata) == (1_002, 3)


def test_typed_events_come_back_on_their_topics(store: EventStore) -> None:
    health = Health(_SECOND, "feed", "healthy")
    with TypedEventBus() as bus, bus.subscribe_health(envelope=True) as states:
        store.append(health, topic="health")
        Replay(store).into(bus).wait()
        received = states.recv()
    assert (received.event, received.topic) == (health, "health")
    assert received.replayed


def test_a_live_envelope_is_not_replayed_and_a_replayed_one_equals_it(store: EventStore) -> None:
    store.append("x", topic="a")
    with EventBus(clock=VirtualClock(5)) as bus, bus.subscribe("a", envelope=True) as letters:
        bus.publish("x", "a")
        Replay(store).into(bus, mixed=True).wait()
        live, replayed = letters.recv(), letters.recv()
    assert (live.replayed, replayed.replayed) == (False, True)
    assert (live.event, live.topic) == (replayed.event, replayed.topic)
    assert pickle.loads(pickle.dumps(replayed)).replayed


def test_the_clock_of_the_bus_follows_the_events(store: EventStore) -> None:
    times = [500, 700, 0, 600, 800]
    store.append_many([Event(time, 0) for time in times])
    clock = VirtualClock()
    with EventBus(clock=clock) as bus, bus.subscribe("price_update", envelope=True) as prices:
        replay = Replay(store)
        replay.pause()
        replay.into(bus)
        assert replay.clock is clock
        shown = []
        for _ in times:
            replay.step()
            stamped = prices.recv().ts_publish
            assert clock.time_ns() == stamped
            shown.append(stamped)
        assert shown == [500, 700, 700, 700, 800]
        replay.seek(600)
        replay.step()
        assert prices.recv().ts_publish == 700
        replay.resume()
        replay.wait()
    mine = VirtualClock(1)
    for _ in Replay(store, clock=mine).batches():
        pass
    assert mine.time_ns() == 800


def test_pause_step_seek_and_stop(store: EventStore) -> None:
    store.append_many(events(1_000))
    with EventBus() as bus, bus.subscribe("price_update.>") as prices:
        replay = Replay(store)
        assert (replay.state, replay.sequences) == ("ready", None)
        replay.pause()
        replay.into(bus, types=[0])
        assert (replay.state, replay.sequences) == ("paused", range(1_000))
        replay.step(2)
        assert [event.metadata for event in (prices.recv(), prices.recv())] == [0, 3]
        replay.seek(1_900)
        replay.step()
        assert prices.recv().metadata == 900
        replay.seek(0)
        replay.step()
        assert prices.recv().metadata == 0
        assert prices.pending == 0
        replay.stop()
        progress = replay.wait()
        assert (progress.state, progress.replayed) == ("stopped", 4)
        for tell in (replay.pause, replay.resume, replay.step, lambda: replay.seek(1)):
            with pytest.raises(Closed, match="over"):
                tell()
        with pytest.raises(ConfigError, match="begun already"):
            replay.into(bus)


def test_nobody_waits_for_a_replay_that_has_not_begun(store: EventStore) -> None:
    store.append(1)
    replay = Replay(store)

    async def awaited() -> None:
        await replay

    for wait in (replay.wait, lambda: replay.wait(0), lambda: asyncio.run(awaited())):
        with pytest.raises(ConfigError, match=r"call into\(\) first"):
            wait()
    assert list(replay.read()) != []
    assert replay.wait().replayed == 1
    stopped = Replay(store)
    stopped.stop()
    assert stopped.wait().state == "stopped"


def test_it_waits_as_long_as_recorded_times_are_apart(store: EventStore) -> None:
    store.append_many([Event(_SECOND, 0), Event(2 * _SECOND, 0), Event(9_000 * _SECOND, 0)])
    with EventBus() as bus, bus.subscribe() as prices:
        with Replay(store).into(bus, speed=1e-3) as replay:
            assert prices.recv().timestamp == _SECOND
            assert replay.wait(timeout=0.01).state == "running"
            assert prices.pending == 0
        assert replay.state == "stopped"
        assert Replay(store).into(bus, speed=1e9, longest_gap=60).wait().skipped_gaps == 1


def test_a_bus_of_others_is_refused_unless_mixed(store: EventStore) -> None:
    store.append_many(events(3))
    for make in (EventBus, EventSystem):
        with make() as bus:
            Replay(store).into(bus).wait()
            bus.publish(Event(1, 0))
            with pytest.raises(ReplayRefused, match="published 1 events"):
                Replay(store).into(bus)
            assert Replay(store).into(bus, mixed=True).wait().replayed == 3


def test_whoever_publishes_meanwhile_ends_it(store: EventStore) -> None:
    store.append_many(events(10))
    with EventSystem() as system, system.subscribe() as subscription:
        replay = Replay(store)
        replay.pause()
        replay.into(system)
        with pytest.raises(ReplayRefused, match="another replay"):
            Replay(store).into(system)
        system.publish(Event(1, 0))
        replay.step()
        with pytest.raises(ReplayRefused, match="others have published"):
            replay.wait()
        assert replay.state == "stopped"
        assert subscription.pending == 2


def test_a_bus_whose_events_are_stored_is_refused_unless_mixed(store: EventStore) -> None:
    store.append("x")
    with EventBus() as bus, bus.subscribe() as stored:
        stored._feed_store()
        with pytest.raises(ReplayRefused, match="a store is attached"):
            Replay(store).into(bus)
        Replay(store).into(bus, mixed=True).wait()
        stored.close()
        with EventBus() as other:
            Replay(store).into(other).wait()


def test_a_slow_subscription_loses_nothing(store: EventStore, make_bus: MakeBus) -> None:
    store.append_many(events(2_000))
    bus = make_bus(capacity=8)
    read, careless = read_all(bus), EventRecorder(bus, 8)
    Replay(store).into(bus).wait()
    assert unflagged(read()) == events(2_000)
    assert 0 < len(careless.get_events()) <= 8
    careless.close()


def test_tasks_read_a_replay_that_is_awaited(store: EventStore) -> None:
    store.append_many(events(5_000))

    async def main() -> None:
        async with EventBus(capacity=64) as bus, bus.subscribe_async() as subscription:
            replay = Replay(store).into(bus)
            with pytest.raises(RuntimeError, match="await"):
                replay.wait()
            waiting = asyncio.ensure_future(replay)
            received: list[Event] = []
            while not (received and is_end(received[-1])):
                received.extend(await subscription.recv_many(100))
            assert unflagged(received[:-1]) == events(5_000)
            assert (await waiting).replayed == (await replay).replayed == 5_000

    run(main)


def test_closing_the_bus_ends_it_with_the_reason(store: EventStore) -> None:
    store.append_many(events(1_000))
    for make in (lambda: EventBus(capacity=4), lambda: EventSystem(normal_capacity=8)):
        bus = make()
        subscription = bus.subscribe()
        replay = Replay(store).into(bus)
        subscription.recv()
        bus.close()
        with pytest.raises(Closed):
            replay.wait()
        assert replay.state == "stopped"
        assert 0 < replay.progress.replayed < 1_000
        subscription.close()


def test_closing_the_store_meanwhile_leaves_the_replay_to_its_end(tmp_path: Path) -> None:
    store = EventStore.open(tmp_path)
    store.append_many(events(20_000))
    with EventSystem(normal_capacity=64) as system:
        read = read_all(system)
        replay = Replay(store).into(system)
        store.close()
        assert unflagged(read()) == events(20_000)
        replay.wait()
    with pytest.raises(Closed), EventBus() as bus:
        Replay(store).into(bus)


def test_what_no_system_can_carry_is_told(store: EventStore) -> None:
    store.append_many([*events(2), {"a": 1}])
    with EventSystem() as system:
        replay = Replay(store).into(system)
        with pytest.raises(ConfigError, match="record 2 is an object"):
            replay.wait()
        assert Replay(store).into(system, types=[0, 1, 2]).wait().replayed == 2
    with pytest.raises(TypeError, match="must be an EventSystem"):
        Replay(store).into("bus")  # type: ignore[arg-type]


def test_batches_are_arrays_and_lists_of_records(store: EventStore) -> None:
    store.append_many([*events(3_000), {"a": 1}, *events(2)])
    *first, objects, last = Replay(store).batches()
    assert all(isinstance(batch, np.ndarray) for batch in first)
    assert all(batch.dtype == tickbus.EVENT_DTYPE for batch in first)
    assert EventBatch(np.concatenate(first)) == EventBatch(events(3_000))
    assert [record.event for record in objects] == [{"a": 1}]
    assert [record.sequence for record in objects] == [3_000]
    assert EventBatch(last) == EventBatch(events(2))
    part = Replay(store).batches(start=1_010, stop=1_020, symbols="S1")
    assert [*np.concatenate(list(part))["metadata"]] == [11, 16]


def test_an_iterator_of_batches_is_stopped_from_elsewhere(store: EventStore) -> None:
    store.append_many([Event(_SECOND, 0), Event(2 * _SECOND, 0)])
    replay = Replay(store)
    batches = replay.batches(speed=1e-6)
    assert len(next(batches)) == 1
    replay.stop()
    assert list(batches) == []


def test_a_capture_is_replayed_as_it_is_recorded(tmp_path: Path, store: EventStore) -> None:
    capture = tmp_path / "trades.csv"
    capture.write_text(
        "timestamp,venue,symbol,price,quantity\n"
        "1700000000000,north,ABC,10.10,2\n1700000000001,south,ABC,10.30,0.5\n",
        encoding="utf-8",
    )
    with EventBus() as bus, bus.subscribe("trade.ABC") as trades:
        replay = Replay(capture, format="csv").into(bus)
        progress = replay.wait()
        first, second = trades.recv(), trades.recv()
    assert (first.source, first.value, first.metadata) == ("north", 10.1, 200_000_000)
    assert (second.source, progress.replayed) == ("south", 2)
    store.append_many([first, second])
    recorded = Replay(store)
    assert sum(map(len, recorded.batches())) == 2
    assert recorded.digest == replay.digest
    with pytest.raises(tickbus.StoreError, match="holds no log"):
        Replay(tmp_path / "nothing" if (tmp_path / "nothing").exists() else tmp_path)
    with pytest.raises(ConfigError, match="a log has its own"):
        Replay(store, format="csv")


def test_a_format_that_there_is_not_is_refused_at_once(tmp_path: Path) -> None:
    capture = tmp_path / "trades"
    capture.write_text("what is this\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="format was 'x'; it must be one of binance, "):
        Replay(capture, format="x")
    with EventBus() as bus, pytest.raises(tickbus.ParseError, match="name it with format= if"):
        Replay(capture).into(bus)


@pytest.mark.parametrize(
    "wrong",
    [
        {"speed": -1},
        {"speed": float("nan")},
        {"types": []},
        {"types": "no_such_type"},
        {"longest_gap": -1},
    ],
)
def test_what_cannot_be_kept_is_refused(store: EventStore, wrong: dict[str, Any]) -> None:
    with EventBus() as bus, pytest.raises(ConfigError):
        Replay(store).into(bus, **wrong)


def test_a_hole_of_others_is_told_where_it_is(store: EventStore) -> None:
    """Whoever loses what others publish is told, as ever."""
    store.append_many(events(5))
    with EventBus("broadcast", 4) as bus, bus.subscribe() as slow:
        for n in range(10):
            bus.publish(n)
        replay = Replay(store).into(bus, mixed=True)
        with pytest.raises(Lagged):
            slow.recv()
        received = [slow.recv() for _ in range(10)]
        assert received[:4] == [6, 7, 8, 9]
        assert unflagged(received[4:9]) == events(5)
        replay.wait()


def test_a_recorder_writes_what_it_keeps_into_a_log(store: EventStore) -> None:
    with EventBus() as bus, EventRecorder(bus, 3) as recorder:
        for n in range(5):
            bus.publish({"n": n}, f"notes.{n}")
        assert recorder.write(store) == range(3)
        bus.publish(Event(7, 0))
        assert recorder.write(store) == range(3, 6)
    kept = [(record.topic, record.event) for record in store.read()]
    assert kept[:3] == [(f"notes.{n}", {"n": n}) for n in (2, 3, 4)]
    assert kept[5] == ("price_update", Event(7, 0))
