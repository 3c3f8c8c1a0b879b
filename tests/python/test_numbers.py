"""Numbers that no argument can be: each is a `ConfigError` that names the argument."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tickbus
from tickbus import (
    BackpressureConfig,
    DeadLetter,
    Event,
    EventBatch,
    EventStore,
    EventSystem,
    LockFreeEventQueue,
    Replay,
    RingEventBus,
    RiskEventSystem,
    VirtualClock,
)

_Call = Callable[[SimpleNamespace, Any], Any]

_WHOLE: list[tuple[str, _Call]] = [
    ("capacity", lambda has, n: RingEventBus[int](n)),
    ("max_topics", lambda has, n: RingEventBus[int](max_topics=n)),
    ("latency_sampling", lambda has, n: RingEventBus[int](latency_sampling=n)),
    ("warn_threshold", lambda has, n: RingEventBus[int](8, BackpressureConfig(warn_threshold=n))),
    ("capacity", lambda has, n: has.bus.subscribe(capacity=n)),
    ("start", lambda has, n: has.bus.subscribe(start=n)),
    ("limit", lambda has, n: has.reader.recv_many(n)),
    ("limit", lambda has, n: has.task.recv_many(n)),
    ("capacity", lambda has, n: LockFreeEventQueue[int](n)),
    ("critical_capacity", lambda has, n: EventSystem(critical_capacity=n)),
    ("high_capacity", lambda has, n: EventSystem(high_capacity=n)),
    ("normal_capacity", lambda has, n: EventSystem(normal_capacity=n)),
    ("max_topics", lambda has, n: EventSystem(max_topics=n)),
    ("latency_sampling", lambda has, n: EventSystem(latency_sampling=n)),
    ("limit", lambda has, n: has.events.recv_many(n)),
    ("limit", lambda has, n: has.events.recv_batch(n)),
    ("limit", lambda has, n: has.events.recv_array(n)),
    ("limit", lambda has, n: has.tasks.recv_many(n)),
    ("limit", lambda has, n: has.tasks.recv_batch(n)),
    ("limit", lambda has, n: has.tasks.recv_array(n)),
    ("id", lambda has, n: tickbus.symbols.name(n)),
    ("id", lambda has, n: tickbus.sources.name(n)),
    ("segment_bytes", lambda has, n: EventStore.open(has.folder, segment_bytes=n)),
    ("max_bytes", lambda has, n: EventStore.open(has.folder, max_bytes=n)),
    ("from_sequence", lambda has, n: has.store.read(n)),
    ("from_sequence", lambda has, n: has.store.read_batches(n)),
    ("missed", lambda has, n: has.store.append_gap(n)),
    ("size", lambda has, n: has.store.retain(size=n)),
    ("count", lambda has, n: has.store.retain(count=n)),
    ("start", lambda has, n: has.store.query(n)),
    ("stop", lambda has, n: has.store.query_batches(stop=n)),
    ("start", lambda has, n: has.store.group("new", start=n)),
    ("max_in_flight", lambda has, n: has.store.group("new", max_in_flight=n)),
    ("limit", lambda has, n: has.group.fetch(n)),
    ("limit", lambda has, n: has.group.try_fetch(n)),
    ("limit", lambda has, n: has.group.fetch_async(n)),
    ("max_attempts", lambda has, n: RiskEventSystem(has.store, max_attempts=n)),
    ("max_in_flight", lambda has, n: RiskEventSystem(has.store, max_in_flight=n)),
    ("seed", lambda has, n: RiskEventSystem(has.store, seed=n)),
    ("event_id", lambda has, n: has.risk.wait_ack(n)),
    ("event_id", lambda has, n: has.risk.wait_ack_async(n)),
    ("letter.event_id", lambda has, n: has.risk.redeliver(_letter(n))),
    ("letter.event_id", lambda has, n: has.risk.discard(_letter(n))),
    ("time", lambda has, n: VirtualClock(n)),
    ("time", lambda has, n: VirtualClock().set(n)),
    ("start", lambda has, n: list(Replay(has.store).read(start=n))),
    ("stop", lambda has, n: list(Replay(has.store).read(stop=n))),
    ("records", lambda has, n: Replay(has.store).step(n)),
    ("time", lambda has, n: Replay(has.store).seek(n)),
]

_SECONDS: list[tuple[str, _Call]] = [
    ("max_block_duration", lambda has, s: BackpressureConfig(max_block_duration=s)),
    ("timeout", lambda has, s: has.bus.publish_timeout(1, s)),
    ("timeout", lambda has, s: has.reader.recv_timeout(s)),
    ("timeout", lambda has, s: tickbus.select([has.reader], timeout=s)),
    ("drain", lambda has, s: has.bus.aclose(s)),
    ("timeout", lambda has, s: has.queue.enqueue_timeout(1, s)),
    ("timeout", lambda has, s: has.queue.dequeue_timeout(s)),
    ("max_block_duration", lambda has, s: EventSystem(max_block_duration=s)),
    ("timeout", lambda has, s: has.system.publish_timeout(Event(1, 0, 1), s)),
    ("timeout", lambda has, s: has.events.recv_timeout(s)),
    ("timeout", lambda has, s: has.system.drain(s)),
    ("drain", lambda has, s: has.system.aclose(s)),
    ("age", lambda has, s: has.store.retain(age=s)),
    ("older_than", lambda has, s: has.store.compress(s)),
    ("timeout", lambda has, s: has.store.append_durable(1).wait(s)),
    ("lease", lambda has, s: has.store.group("new", lease=s)),
    ("max_idle", lambda has, s: has.store.group("new", max_idle=s)),
    ("timeout", lambda has, s: has.group.fetch(timeout=s)),
    ("lease", lambda has, s: RiskEventSystem(has.store, lease=s)),
    ("retry_base", lambda has, s: RiskEventSystem(has.store, retry_base=s)),
    ("retry_cap", lambda has, s: RiskEventSystem(has.store, retry_cap=s)),
    ("escalate_after", lambda has, s: RiskEventSystem(has.store, escalate_after=s)),
    ("timeout", lambda has, s: has.consumer.take(s)),
    ("timeout", lambda has, s: has.risk.wait_ack(0, s)),
    ("timeout", lambda has, s: has.risk.wait_ack_async(0, s)),
    ("timeout", lambda has, s: Replay(has.store).wait(s)),
    ("timeout", lambda has, s: has.attachment.wait(s)),
    ("longest_gap", lambda has, s: list(Replay(has.store).batches(longest_gap=s))),
]

_NOT_WHOLE = (-1, 1 << 70, 1.5, True, "1")
_NOT_SECONDS = (-1.0, float("nan"), float("inf"), 1 << 70, 10**400, True, "1")
_CASES = [
    pytest.param(name, call, wrong, id=f"{name}-{place}")
    for calls, wrong in ((_WHOLE, _NOT_WHOLE), (_SECONDS, _NOT_SECONDS))
    for place, (name, call) in enumerate(calls)
]


def _finish(made: Any) -> None:
    if inspect.iscoroutine(made):
        asyncio.run(made)


def _letter(event_id: int) -> DeadLetter:
    return DeadLetter(event_id, None, None, "", (), None)


@pytest.fixture(scope="module")
def has(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One of each of what has methods that take numbers."""
    folder: Path = tmp_path_factory.mktemp("numbers")
    with (
        RingEventBus[int](8) as bus,
        bus.subscribe() as reader,
        EventSystem() as system,
        system.subscribe() as events,
        EventStore.open(folder / "log") as store,
        EventStore.open(folder / "risks") as risks,
        RiskEventSystem(risks) as risk,
    ):
        attachment = store.attach(system)
        task, tasks = bus.subscribe_async(), system.subscribe_async()
        yield SimpleNamespace(
            bus=bus,
            reader=reader,
            task=task,
            queue=LockFreeEventQueue[int](8),
            system=system,
            events=events,
            tasks=tasks,
            store=store,
            group=store.group("readers"),
            risk=risk,
            attachment=attachment,
            consumer=risk.register("limits"),
            folder=folder / "other",
        )
        task.close()
        tasks.close()


@pytest.mark.parametrize(("name", "call", "wrong"), _CASES)
def test_a_bad_number_is_a_config_error_that_names_the_argument(
    has: SimpleNamespace, name: str, call: _Call, wrong: tuple[Any, ...]
) -> None:
    for bad in wrong:
        with pytest.raises(tickbus.ConfigError) as told:
            _finish(call(has, bad))
        message = str(told.value)
        assert message.startswith(f"{name} was {bad!r}; it must be "), message


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), True, "1"])
def test_a_bad_speed_is_a_config_error(has: SimpleNamespace, bad: Any) -> None:
    with pytest.raises(tickbus.ConfigError, match=r"speed was .*; it must be a finite number"):
        list(Replay(has.store).batches(speed=bad))


@pytest.mark.parametrize("asked", [{"types": 256}, {"types": [-1]}, {"symbols": 1 << 32}])
def test_a_type_or_symbol_out_of_range_is_a_config_error(asked: dict[str, Any]) -> None:
    with EventSystem() as system, pytest.raises(tickbus.ConfigError, match="it must be from 0"):
        system.subscribe(**asked)


@pytest.mark.parametrize("bad", [-1, 1 << 70, True, "1"])
def test_a_handler_of_overflows_that_returns_no_number_is_told(bad: Any) -> None:
    with EventSystem(critical_capacity=1, max_block_duration=0) as system:
        system.handle_critical_overflow(lambda overflow: bad)
        with system.subscribe():
            event = Event(1, tickbus.EventType.EmergencyStop, 255)
            assert system.publish(event) == 1
            with pytest.raises(tickbus.ConfigError, match="what the handler returned was"):
                system.publish(event)


def test_no_batch_has_an_index_that_large() -> None:
    with pytest.raises(IndexError, match="the batch has 0 events"):
        EventBatch([])[1 << 70]
