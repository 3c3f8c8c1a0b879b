"""Risk events: durable before they are published, and delivered until they are acknowledged."""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import run, run_child
from tickbus import (
    AckTimeout,
    Closed,
    ConfigError,
    CriticalDelivery,
    DeadLetter,
    Escalation,
    Event,
    EventStore,
    EventType,
    ReceiveTimeout,
    RiskConsumer,
    RiskEventSystem,
    StaleToken,
    StoreFull,
)
from tickbus.events import Health
from tickbus.risk import ConsumerStats, FailedAttempt, TooManyInFlight

PATIENCE = 60.0
"""Seconds that no test reaches."""
CONSUMER = Path(__file__).with_name("risk_consumer.py")


class StandingClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0

    def time_ns(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "log") as store:
        yield store


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
def risk(store: EventStore, clock: StandingClock) -> Iterator[RiskEventSystem]:
    with RiskEventSystem(store, clock=clock, seed=1, max_attempts=3) as risk:
        yield risk


def ids(consumer: RiskConsumer) -> list[tuple[int | None, int]]:
    """Takes all that there is now."""
    found = []
    while (delivery := consumer.try_take()) is not None:
        found.append((delivery.event_id, delivery.attempt))
    return found


def fail(delivery: CriticalDelivery) -> None:
    raise ValueError(f"no room for {delivery.event}")


# Publishing and acknowledging


@pytest.mark.parametrize(
    "event",
    [
        Event(1, EventType.CircuitBreaker, symbol="BTCUSDT", value=2.0),
        Health(7, "risk", "degraded"),
        {"reduce": "BTCUSDT"},
    ],
    ids=["compact", "typed", "object"],
)
def test_an_event_is_in_the_log_and_comes_as_it_was_published(
    store: EventStore, risk: RiskEventSystem, event: object
) -> None:
    consumer = risk.register("limits")
    assert repr(consumer) == "<RiskConsumer limits>"
    event_id = risk.publish_critical(event, key="account 7")
    assert store.durable_sequence is not None
    assert store.durable_sequence >= event_id
    assert next(iter(store.read(event_id))).event == event
    delivery = consumer.take(PATIENCE)
    assert (delivery.event, delivery.event_id) == (event, event_id)
    assert (delivery.key, delivery.attempt, delivery.live) == ("account 7", 1, False)
    assert repr(delivery) == f"<CriticalDelivery event_id={event_id} attempt=1 key='account 7'>"
    delivery.ack()
    assert risk.wait_ack(event_id, PATIENCE)
    with pytest.raises(StaleToken, match="not the newest one any more"):
        delivery.ack()


def test_each_consumer_gets_what_was_published_since_it_was_registered(
    risk: RiskEventSystem,
) -> None:
    one = risk.register("one")
    first = risk.publish_critical(1)
    two = risk.register("two")
    second = risk.publish_critical(2)
    assert ids(one) == [(first, 1), (second, 1)]
    assert ids(two) == [(second, 1)]


def test_events_of_a_key_wait_for_one_another_unless_the_consumer_wants_no_order(
    risk: RiskEventSystem,
) -> None:
    strict, loose = risk.register("strict"), risk.register("loose", ordered=False)
    a1, a2 = (risk.publish_critical(n, key="a") for n in (1, 2))
    b1, none = risk.publish_critical(3, key="b"), risk.publish_critical(4)
    assert [event for event, _ in ids(loose)] == [a1, a2, b1, none]
    first = strict.take(PATIENCE)
    assert first.event_id == a1
    assert [event for event, _ in ids(strict)] == [b1, none]
    first.ack()
    assert [event for event, _ in ids(strict)] == [a2]
    rows = {row.name: row for row in risk.stats().consumers}
    assert rows["strict"] == ConsumerStats("strict", True, 3, 3)
    assert rows["loose"] == ConsumerStats("loose", False, 4, 4)


def test_an_attempt_that_fails_is_tried_again_after_a_wait_that_grows_and_is_drawn_from_a_seed(
    tmp_path: Path,
) -> None:
    def waits(folder: Path) -> list[int]:
        """Returns the waits after each attempt, in tenths of a second."""
        clock = StandingClock()
        options: dict[str, Any] = {"seed": 7, "retry_base": 1.0, "retry_cap": 8.0}
        found = []
        with (
            EventStore.open(folder) as store,
            RiskEventSystem(store, clock=clock, **options) as risk,
        ):
            consumer = risk.register("limits")
            risk.publish_critical("event")
            consumer.take(PATIENCE).nack("not now")
            while len(found) < 8:
                begun = clock.now
                while (delivery := consumer.try_take()) is None:
                    clock.advance(0.1)
                found.append((clock.now - begun) // 10**8)
                delivery.nack("not now")
        return found

    drawn = waits(tmp_path / "a")
    assert drawn == waits(tmp_path / "b")
    longest = [10, 20, 40, 80, 80, 80, 80, 80]
    assert all(wait <= limit + 1 for wait, limit in zip(drawn, longest, strict=True)), drawn
    assert len(set(drawn)) > 3, "they are drawn"


def test_a_stale_token_is_refused_and_the_newest_one_counts(
    risk: RiskEventSystem, clock: StandingClock
) -> None:
    consumer = risk.register("limits")
    event_id = risk.publish_critical("event")
    late = consumer.take(PATIENCE)
    clock.advance(30)
    risk.check_deadlines()
    clock.advance(30)
    again = consumer.take(PATIENCE)
    assert (again.event_id, again.attempt) == (event_id, 2)
    for settle in (late.ack, lambda: late.nack("late")):
        with pytest.raises(StaleToken):
            settle()
    again.ack()
    assert risk.wait_ack(event_id, PATIENCE)


# Handlers


def test_a_handler_that_returns_acknowledges_and_one_that_raises_gets_it_again(
    store: EventStore,
) -> None:
    with RiskEventSystem(store, retry_base=0.0, retry_cap=0.0) as risk:
        seen: list[int] = []

        def handle(delivery: CriticalDelivery) -> None:
            seen.append(delivery.attempt)
            if delivery.attempt < 3:
                fail(delivery)

        risk.register("limits", handle)
        assert risk.wait_ack(risk.publish_critical("event"), PATIENCE)
        assert seen == [1, 2, 3]
        assert risk.stats().failed == 2


def test_a_coroutine_function_handles_events_in_a_task(store: EventStore) -> None:
    async def main() -> None:
        async with RiskEventSystem(store, retry_base=0.0, retry_cap=0.0) as risk:

            async def handle(delivery: CriticalDelivery) -> None:
                await asyncio.sleep(0)
                if delivery.attempt == 1:
                    fail(delivery)

            risk.register("limits", handle)
            event_id = await risk.publish_critical_async("event", key="k")
            assert await risk.wait_ack_async(event_id, PATIENCE)
            with pytest.raises(RuntimeError, match="publish_critical_async"):
                risk.publish_critical("event")
            with pytest.raises(RuntimeError, match="wait_ack_async"):
                risk.wait_ack(event_id)

    asyncio.run(main())


def test_a_system_without_handlers_is_closed_at_once(store: EventStore) -> None:
    risk = RiskEventSystem(store)
    asyncio.run(risk.aclose())
    assert risk.closed


def test_a_task_with_a_handler_may_close_the_system(store: EventStore) -> None:
    async def main() -> None:
        risk, closed = RiskEventSystem(store), asyncio.Event()

        async def handle(delivery: CriticalDelivery) -> None:
            await risk.aclose()
            closed.set()

        risk.register("limits", handle)
        await risk.publish_critical_async("event")
        async with asyncio.timeout(PATIENCE):
            await closed.wait()
        await risk.aclose()

    asyncio.run(main())


def test_two_tasks_with_handlers_may_close_the_system_at_once(store: EventStore) -> None:
    async def main() -> None:
        risk, both = RiskEventSystem(store), asyncio.Barrier(3)
        closed: list[int | None] = []

        async def handle(delivery: CriticalDelivery) -> None:
            await both.wait()
            await risk.aclose()
            closed.append(delivery.event_id)

        risk.register("limits", handle)
        risk.register("positions", handle)
        event_id = await risk.publish_critical_async("event")
        async with asyncio.timeout(PATIENCE):
            await both.wait()
            await risk.aclose()
        assert closed == [event_id, event_id]

    asyncio.run(main())


def test_a_coroutine_function_needs_a_loop(risk: RiskEventSystem) -> None:
    class Handler:
        async def __call__(self, delivery: CriticalDelivery) -> None: ...

    with pytest.raises(RuntimeError, match="no running event loop"):
        risk.register("limits", Handler())


def test_a_consumer_is_read_by_async_for_and_by_for_until_the_system_is_closed(
    store: EventStore,
) -> None:
    risk = RiskEventSystem(store)
    consumer = risk.register("limits")
    first = risk.publish_critical(1)
    second = risk.publish_critical(2)

    async def main() -> None:
        async for delivery in consumer:
            assert delivery.event_id == first
            await delivery.ack_async()
            with pytest.raises(StaleToken):
                await delivery.nack_async("late")
            break

    asyncio.run(main())
    for delivery in consumer:
        assert delivery.event_id == second
        delivery.ack()
        risk.close()
    assert run(lambda: _all(consumer)) == []
    assert risk.closed
    assert repr(risk) == "<RiskEventSystem closed>"
    with pytest.raises(Closed):
        risk.publish_critical(3)
    with pytest.raises(Closed):
        risk.register("other")


async def _all(consumer: RiskConsumer) -> list[CriticalDelivery]:
    return [delivery async for delivery in consumer]


def test_cancelling_take_loses_nothing(risk: RiskEventSystem) -> None:
    async def main() -> None:
        consumer = risk.register("limits")
        waiting = asyncio.create_task(consumer.take_async())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        event_id = await risk.publish_critical_async("event")
        assert (await consumer.take_async()).event_id == event_id

    asyncio.run(main())


# Waiting for acknowledgments


def test_wait_ack_says_what_was_tried_when_it_gives_up(risk: RiskEventSystem) -> None:
    consumer = risk.register("limits")
    event_id = risk.publish_critical("event")
    consumer.take(PATIENCE)
    with pytest.raises(AckTimeout, match=r"within 0\.001 s, after 1 attempts") as late:
        risk.wait_ack(event_id, 0.001)
    assert (late.value.event_id, late.value.attempts) == (event_id, 1)
    assert pickle.loads(pickle.dumps(late.value)).attempts == 1
    with pytest.raises(AckTimeout):
        run(lambda: risk.wait_ack_async(event_id, 0.001))
    with pytest.raises(ConfigError, match="no risk event"):
        risk.wait_ack(event_id + 1)
    with pytest.raises(ReceiveTimeout, match="'limits' got no event"):
        consumer.take(0.001)


def test_wait_ack_is_woken_by_the_last_acknowledgment(risk: RiskEventSystem) -> None:
    one, two = risk.register("one"), risk.register("two")
    event_id = risk.publish_critical("event")
    waited: queue.Queue[bool] = queue.Queue()
    waiting = threading.Thread(target=lambda: waited.put(risk.wait_ack(event_id)))
    waiting.start()
    one.take(PATIENCE).ack()
    assert waited.empty()
    two.take(PATIENCE).ack()
    assert waited.get(timeout=PATIENCE)
    waiting.join()


# Escalation and dead letters


def test_an_event_is_escalated_by_its_age_and_still_delivered(
    store: EventStore, clock: StandingClock
) -> None:
    told: queue.Queue[Escalation] = queue.Queue()
    with RiskEventSystem(store, clock=clock, escalate=told.put) as risk:
        consumer = risk.register("limits")
        event_id = risk.publish_critical("event")
        clock.advance(4.999)
        risk.check_deadlines()
        assert risk.stats().escalated == 0
        clock.advance(0.001)
        risk.check_deadlines()
        assert told.get(timeout=PATIENCE) == Escalation(event_id, "limits", 0)
        assert consumer.take(PATIENCE).event_id == event_id


def test_escalation_needs_no_call_on_the_system_s_own_clock(store: EventStore) -> None:
    told: queue.Queue[Escalation] = queue.Queue()
    with RiskEventSystem(store, escalate_after=0.01, escalate=told.put) as risk:
        risk.register("limits")
        event_id = risk.publish_critical("event")
        assert told.get(timeout=PATIENCE).event_id == event_id


def test_without_any_consumer_an_event_escalates_at_once(store: EventStore) -> None:
    told: queue.Queue[object] = queue.Queue()
    with RiskEventSystem(store, escalate=told.put, on_dead_letter=told.put) as risk:
        event_id = risk.publish_critical({"reduce": "BTCUSDT"}, key="k")
        assert told.get(timeout=PATIENCE) == Escalation(event_id, None, 0)
        letter = told.get(timeout=PATIENCE)
        assert isinstance(letter, DeadLetter)
        assert (letter.event_id, letter.consumer, letter.key) == (event_id, None, "k")
        assert letter.event == {"reduce": "BTCUSDT"}
        assert not risk.wait_ack(event_id)
        with pytest.raises(ConfigError, match="nobody is registered to get dead letter"):
            risk.redeliver(letter)
        consumer = risk.register("limits")
        risk.redeliver(letter)
        assert consumer.take(PATIENCE).event_id == event_id
        assert risk.dead_letters() == []


def test_what_is_no_dead_letter_is_refused_with_what_is_wanted(store: EventStore) -> None:
    with RiskEventSystem(store) as risk:
        event_id = risk.publish_critical("event")
        for settle in (risk.redeliver, risk.discard):
            with pytest.raises(TypeError, match=rf"was {event_id}; it must be a DeadLetter"):
                settle(event_id)  # type: ignore[arg-type]
        assert [letter.event_id for letter in risk.dead_letters()] == [event_id]


def test_a_dead_letter_keeps_its_exceptions_and_can_be_delivered_again(tmp_path: Path) -> None:
    told: queue.Queue[object] = queue.Queue()
    options: dict[str, Any] = {"retry_base": 0.0, "retry_cap": 0.0, "max_attempts": 2}
    with (
        EventStore.open(tmp_path) as store,
        RiskEventSystem(store, escalate=told.put, on_dead_letter=told.put, **options) as risk,
    ):
        risk.register("limits", fail)
        event_id = risk.publish_critical("event", key="k")
        assert told.get(timeout=PATIENCE) == Escalation(event_id, "limits", 2)
        letter = told.get(timeout=PATIENCE)
        why = "ValueError: no room for event"
        attempts = (FailedAttempt(1, why), FailedAttempt(2, why))
        assert letter == DeadLetter(event_id, "limits", "k", why, attempts, "event")
        assert not risk.wait_ack(event_id)
    with EventStore.open(tmp_path) as store, RiskEventSystem(store, **options) as risk:
        assert risk.dead_letters() == [letter]
        risk.register("limits", lambda delivery: None)
        risk.redeliver(risk.dead_letters()[0])
        assert risk.wait_ack(event_id, PATIENCE)
        assert risk.dead_letters() == []
        with pytest.raises(ConfigError, match="no dead letter"):
            risk.discard(letter)


def test_what_a_removed_consumer_had_left_becomes_dead_letters(risk: RiskEventSystem) -> None:
    consumer = risk.register("limits")
    event_id = risk.publish_critical("event")
    assert risk.unregister("limits")
    assert not risk.unregister("limits")
    with pytest.raises(Closed, match="was removed"):
        consumer.try_take()
    (letter,) = risk.dead_letters()
    assert (letter.event_id, letter.consumer) == (event_id, "limits")
    risk.discard(letter)
    assert risk.dead_letters() == []


def test_a_consumer_with_too_many_in_flight_is_told_of(store: EventStore) -> None:
    told: queue.Queue[TooManyInFlight] = queue.Queue()
    with RiskEventSystem(store, max_in_flight=2, on_limit=told.put) as risk:
        consumer = risk.register("limits")
        for n in range(3):
            risk.publish_critical(n)
        assert len(ids(consumer)) == 2
        assert told.get(timeout=PATIENCE) == TooManyInFlight("limits", 2)
        assert risk.stats().limited == 1


def test_who_is_told_may_raise_and_is_told_on(
    store: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    told: queue.Queue[int] = queue.Queue()

    def escalate(escalation: Escalation) -> None:
        told.put(escalation.event_id)
        raise ValueError("nobody is there")

    with RiskEventSystem(store, escalate=escalate) as risk:
        for n in range(2):
            assert risk.publish_critical(n) == n
            assert told.get(timeout=PATIENCE) == n
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


# Refusals


@pytest.fixture
def full(tmp_path: Path) -> Iterator[EventStore]:
    small = 64 * 1024
    with EventStore.open(tmp_path / "log", segment_bytes=small, max_bytes=2 * small) as store:
        yield store


def fill(store: EventStore) -> None:
    with pytest.raises(StoreFull):
        store.append_many(b"x" * 8_192 for _ in range(1_000))


def publish_until_refused(risk: RiskEventSystem) -> StoreFull:
    def publish() -> None:
        for n in range(1_000):
            risk.publish_critical({"n": n})

    with pytest.raises(StoreFull) as refused:
        publish()
    return refused.value


def test_what_a_full_log_refuses_is_delivered_live_and_the_error_says_so(full: EventStore) -> None:
    seen: queue.Queue[bool] = queue.Queue()
    with RiskEventSystem(full) as risk:
        risk.register("limits", lambda delivery: seen.put(delivery.live))
        idle = risk.register("audit")
        fill(full)
        assert publish_until_refused(risk).delivered_live == 2
        while not seen.get(timeout=PATIENCE):
            pass
        live = [delivery for delivery in iter(idle.try_take, None) if delivery.live]
        assert [delivery.event_id for delivery in live] == [None]
        live[0].ack()
        assert repr(live[0]) == "<CriticalDelivery live>"


def test_without_a_consumer_here_nothing_is_delivered_live(full: EventStore) -> None:
    with RiskEventSystem(full) as risk:
        fill(full)
        assert publish_until_refused(risk).delivered_live == 0


def test_what_cannot_be_encoded_is_neither_stored_nor_delivered(
    store: EventStore, risk: RiskEventSystem
) -> None:
    consumer = risk.register("limits")
    with pytest.raises(TypeError, match="cannot encode"):
        risk.publish_critical(object())
    with pytest.raises(ConfigError, match="wildcards"):
        risk.publish_critical("event", topic="a.*")
    with pytest.raises(ConfigError, match="the key had 1025 bytes"):
        risk.publish_critical("event", key="k" * 1_025)
    assert consumer.try_take() is None


def test_what_a_replay_has_published_is_no_risk_event(
    store: EventStore, risk: RiskEventSystem
) -> None:
    consumer = risk.register("limits")
    replayed = Event(1, 0, 129)
    assert replayed.replayed
    with pytest.raises(ConfigError, match="published by a replay") as refused:
        risk.publish_critical(replayed)
    assert refused.value.__class__ is ConfigError, "it is not delivered live"
    assert consumer.try_take() is None
    assert store.stats().next_sequence == 0
    risk.publish_critical(Event(1, 0, 1))
    assert consumer.take().event == Event(1, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lease": 0}, "the lease was 0"),
        ({"max_attempts": 0}, "max_attempts was 0"),
        ({"max_attempts": 513}, "max_attempts was 513"),
        ({"retry_base": 2.0, "retry_cap": 1.0}, "retry_cap was 1s"),
        ({"retry_base": -1.0}, "retry_base was -1"),
        ({"escalate_after": float("nan")}, "escalate_after was nan"),
        ({"max_in_flight": 0}, "max_in_flight was 0"),
    ],
)
def test_what_a_risk_system_cannot_keep_is_refused(
    store: EventStore, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RiskEventSystem(store, **arguments)


def test_a_log_has_one_risk_system(store: EventStore, risk: RiskEventSystem) -> None:
    with pytest.raises(ConfigError, match="has a risk system already"):
        RiskEventSystem(store)
    risk.close()
    with RiskEventSystem(store) as other:
        with pytest.raises(ConfigError, match="the name of the consumer had 0 bytes"):
            other.register("")
        for whose in (other._core, other.register("limits")._core):
            with pytest.raises(TypeError, match="cannot pickle"):
                pickle.dumps(whose)


# Restarts


def test_attempts_and_acknowledgments_survive_the_process(tmp_path: Path) -> None:
    with EventStore.open(tmp_path) as store, RiskEventSystem(store) as risk:
        consumer = risk.register("limits")
        acked, left = risk.publish_critical(1), risk.publish_critical(2)
        for _ in range(2):
            delivery = consumer.take(PATIENCE)
            if delivery.event_id == acked:
                delivery.ack()
    options: dict[str, Any] = {"retry_base": 0.0, "retry_cap": 0.0}
    with EventStore.open(tmp_path) as store, RiskEventSystem(store, **options) as risk:
        delivery = risk.register("limits").take(PATIENCE)
        assert (delivery.event_id, delivery.attempt) == (left, 2)
        assert risk.wait_ack(acked)


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    assert child.stdout is not None
    return iter(child.stdout.readline, "")


def kill_at(log: Path, database: Path, events: int, effect: int | None) -> bool:
    """Runs the consumer and kills it between an effect and its acknowledgment, or lets it end."""
    command = [sys.executable, str(CONSUMER), str(log), str(database), str(events)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        effects = 0
        for line in _lines(child):
            if line == "done\n":
                return True
            effects += "effect" in line
            if effects > 0 and effects - 1 == effect:
                child.send_signal(signal.SIGKILL)
                return False
    raise AssertionError(f"the consumer ended with {child.returncode}")


def test_a_consumer_that_is_killed_between_effect_and_acknowledgment_has_each_effect_once(
    tmp_path: Path,
) -> None:
    log, database, events = tmp_path / "log", tmp_path / "effects.db", 12
    kills = 0
    while not kill_at(log, database, events, effect=0 if kills % 2 else 1 + kills % 3):
        kills += 1
        if kills == 8:
            break
    assert kill_at(log, database, events, effect=None)
    rows = sqlite3.connect(database).execute("SELECT number FROM effects ORDER BY number")
    assert [number for (number,) in rows] == list(range(events))
    assert kills > 3


def test_a_handler_that_kills_the_process_is_counted_and_becomes_a_dead_letter(
    tmp_path: Path,
) -> None:
    script = f"""
    import os, signal
    from tickbus import EventStore, RiskEventSystem
    store = EventStore.open({str(tmp_path)!r})
    risk = RiskEventSystem(store, max_attempts=2, retry_base=0.0, retry_cap=0.0)
    if store.stats().next_sequence == 0:
        risk.register("limits")
        risk.publish_critical("poison")
    risk.register("limits", lambda delivery: os.kill(os.getpid(), signal.SIGKILL))
    print(risk.wait_ack(0), [attempt.reason for attempt in risk.dead_letters()[0].attempts])
    risk.close()
    store.close()
    """
    codes = [run_child(script) for _ in range(3)]
    assert [child.returncode for child in codes[:2]] == [-signal.SIGKILL] * 2
    reason = "the process ended before it was acknowledged"
    assert codes[2].stdout == f"False {[reason] * 2}\n", codes[2].stderr


_BROKEN = """
import asyncio, logging, resource, threading
import tickbus
from tickbus import EventStore, RiskEventSystem

class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []
        self.has_two = threading.Event()

    def emit(self, record):
        self.texts.append(record.getMessage())
        if sum("only live" in text for text in self.texts) == 2:
            self.has_two.set()

log = Log()
logging.getLogger("tickbus").addHandler(log)
store = EventStore.open({folder!r})
seen = []

def see(delivery):
    seen.append((delivery.live, delivery.event))
    # From now on no file takes another byte.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, resource.RLIM_INFINITY))

def publish(risk, events):
    # Of what was published before, one was handled, and no attempt at the other can be counted.
    for event in events:
        try:
            risk.publish_critical(event)
        except tickbus.StoreError as error:
            yield type(error).__name__, error.delivered_live

def close():
    try:
        store.close()
    except tickbus.StoreError:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def test_a_handler_gets_live_what_a_broken_disk_refuses(tmp_path: Path) -> None:
    script = (
        _BROKEN.format(folder=str(tmp_path))
        + """
told = []
with RiskEventSystem(store) as risk:
    risk.register("limits")
    risk.publish_critical(0)
    risk.publish_critical("stays")
    risk.register("limits", see)
    log.has_two.wait()
    told = list(publish(risk, [1, 2]))
    while len(seen) < 3:
        pass
close()
print(seen, [live for _, live in told])
"""
    )
    child = run_child(script)
    expected = f"{[(False, 0), (True, 1), (True, 2)]} [1, 1]\n"
    assert (child.returncode, child.stdout) == (0, expected), child.stderr


def test_a_task_gets_live_what_a_broken_disk_refuses(tmp_path: Path) -> None:
    script = (
        _BROKEN.format(folder=str(tmp_path))
        + """
async def main():
    async with RiskEventSystem(store) as risk:
        changed = asyncio.Event()

        async def handle(delivery):
            see(delivery)
            changed.set()

        risk.register("limits")
        await risk.publish_critical_async(0)
        await risk.publish_critical_async("stays")
        risk.register("limits", handle)
        await asyncio.to_thread(log.has_two.wait)
        told = await asyncio.to_thread(lambda: list(publish(risk, [1, 2])))
        while len(seen) < 3:
            changed.clear()
            await changed.wait()
    print(seen, [live for _, live in told])

asyncio.run(main())
close()
"""
    )
    child = run_child(script)
    expected = f"{[(False, 0), (True, 1), (True, 2)]} [1, 1]\n"
    assert (child.returncode, child.stdout) == (0, expected), child.stderr


def test_a_handler_may_close_the_system(store: EventStore) -> None:
    closed = threading.Event()
    risk = RiskEventSystem(store)

    def handle(delivery: CriticalDelivery) -> None:
        risk.close()
        closed.set()

    risk.register("limits", handle)
    risk.publish_critical("event")
    assert closed.wait(PATIENCE)
    assert risk.closed


def test_a_handler_that_exits_has_failed_and_its_consumer_goes_on(store: EventStore) -> None:
    attempts: queue.Queue[int] = queue.Queue()

    def handle(delivery: CriticalDelivery) -> None:
        attempts.put(delivery.attempt)
        if delivery.attempt == 1:
            sys.exit("no more")

    with RiskEventSystem(store, retry_base=0.0) as risk:
        risk.register("limits", handle)
        event_id = risk.publish_critical("event")
        risk.wait_ack(event_id, PATIENCE)
    assert [attempts.get_nowait(), attempts.get_nowait()] == [1, 2]


def test_what_cannot_be_called_is_refused_at_once(store: EventStore) -> None:
    for wrong in ("escalate", "on_dead_letter", "on_limit", "clock"):
        arguments: dict[str, Any] = {wrong: 5}
        with pytest.raises(TypeError, match=f"{wrong}.* must be something that can be called"):
            RiskEventSystem(store, **arguments)
    nothing: Any = 5
    with RiskEventSystem(store) as risk:
        with pytest.raises(TypeError, match="handler was 5; it must be something that can be"):
            risk.register("limits", nothing)
        assert risk.register("limits").try_take() is None


def test_a_system_that_was_closed_leaves_the_next_one_alone(store: EventStore) -> None:
    old = RiskEventSystem(store)
    old.close()
    with RiskEventSystem(store) as risk:
        handled: queue.Queue[int | None] = queue.Queue()
        risk.register("limits", lambda delivery: handled.put(delivery.event_id))
        old.close()
        with pytest.raises(Closed, match="the log, or what stands on it, is closed"):
            old.register("limits")
        del old
        gc.collect()
        assert not risk.closed
        event_id = risk.publish_critical("event")
        risk.wait_ack(event_id, PATIENCE)
        assert handled.get_nowait() == event_id


def test_two_handlers_may_close_the_system_at_once(store: EventStore) -> None:
    risk, both = RiskEventSystem(store), threading.Barrier(3)
    closed: list[int | None] = []

    def handle(delivery: CriticalDelivery) -> None:
        both.wait(PATIENCE)
        risk.close()
        closed.append(delivery.event_id)

    risk.register("limits", handle)
    risk.register("positions", handle)
    event_id = risk.publish_critical("event")
    both.wait(PATIENCE)
    risk.close()
    assert closed == [event_id, event_id]


def test_the_thread_of_an_unregistered_consumer_is_let_go(risk: RiskEventSystem) -> None:
    risk.register("limits", lambda delivery: None)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "tickbus-risk-limits"]
    of_thread = weakref.ref(thread)
    assert risk.unregister("limits")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert of_thread() is None


def test_after_fork_every_call_raises_forked_error(tmp_path: Path) -> None:
    script = f"""
    import asyncio, os, sys, warnings
    import tickbus

    store = tickbus.EventStore.open({str(tmp_path)!r})
    store.append_durable([1, 2]).wait()
    group = store.group("readers")
    batch = group.fetch(1)
    risk = tickbus.RiskEventSystem(store, escalate=print)
    consumer = risk.register("limits")
    risk.publish_critical("event")
    delivery = consumer.take()
    letters = risk.dead_letters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()

    async def first(all_of_them):
        async for one in all_of_them:
            return one

    if process == 0:
        calls = [
            group.fetch, group.try_fetch, group.stats, lambda: list(group),
            lambda: asyncio.run(first(group)), lambda: asyncio.run(group.fetch_async()),
            batch.commit, batch.give_back, lambda: list(batch), lambda: batch.sequences,
            lambda: asyncio.run(batch.commit_async()), store.groups, lambda: store.group("a"),
            lambda: risk.publish_critical(1), lambda: asyncio.run(risk.publish_critical_async(1)),
            lambda: risk.register("other"), lambda: risk.unregister("limits"),
            lambda: risk.wait_ack(2), letters, risk.stats, risk.check_deadlines, risk.close,
            consumer.take, consumer.try_take, lambda: list(consumer),
            lambda: asyncio.run(first(consumer)), delivery.ack, lambda: delivery.nack("no"),
            lambda: asyncio.run(delivery.ack_async()),
        ]
        for place, call in enumerate(calls):
            try:
                call()
            except tickbus.ForkedError:
                continue
            print("no error", place, flush=True)
            os._exit(1)
        assert risk.closed
        sys.exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    delivery.ack()
    batch.commit()
    assert risk.wait_ack(2)
    risk.close()
    store.close()
    """
    child = run_child(script)
    assert child.returncode == 0, (child.stdout, child.stderr)


def test_the_interpreter_ends_while_handlers_wait(tmp_path: Path) -> None:
    script = f"""
    from tickbus import EventStore, RiskEventSystem
    store = EventStore.open({str(tmp_path)!r})
    risk = RiskEventSystem(store, escalate=print)
    risk.register("limits", print)
    risk.publish_critical("event")
    """
    child = run_child(script)
    assert child.returncode == 0, child.stderr
