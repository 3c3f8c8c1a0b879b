"""Threads: many publishers at once, waiting without the GIL, Ctrl-C, and what a close frees."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import tickbus
from support import (
    PATIENCE_WITHOUT_END,
    Hole,
    MakeBus,
    assert_holes_exact,
    assert_sums_closed,
    drops,
    read_all,
    read_to_the_end,
    row_of,
    run,
    run_child,
)

THREADS = 100
EVENTS = 1_000

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)


def test_many_threads_publish_and_nothing_is_lost_or_reordered(
    make_bus: MakeBus, backend: str
) -> None:
    total = THREADS * EVENTS
    capacity = 1_024 if backend == "lock_free" else total
    bus = make_bus(capacity, max_block_duration=PATIENCE_WITHOUT_END)
    subscriptions = [bus.subscribe(), bus.subscribe()]
    received: list[list[tuple[int, int]]] = [[], []]
    start = threading.Barrier(THREADS)
    numbers: list[set[int]] = [set() for _ in range(THREADS)]

    def produce(publisher: int) -> None:
        start.wait()
        numbers[publisher] = {bus.publish((publisher, event)) for event in range(EVENTS)}

    def consume(place: int) -> None:
        received[place] = read_to_the_end(subscriptions[place])

    consumers = [threading.Thread(target=consume, args=(place,)) for place in range(2)]
    producers = [threading.Thread(target=produce, args=(place,)) for place in range(THREADS)]
    for thread in consumers + producers:
        thread.start()
    for thread in producers:
        thread.join()
    bus.close()
    for thread in consumers:
        thread.join()
    assert numbers == [{2}] * THREADS
    for events, subscription in zip(received, subscriptions, strict=True):
        for publisher in range(THREADS):
            assert [event for who, event in events if who == publisher] == list(range(EVENTS))
        assert len(events) == total
        row = row_of(bus, subscription)
        assert (row.offered, row.delivered, row.pending) == (total, total, 0)
        assert row.dropped == drops()
    assert bus.metrics().total_published == total
    assert_sums_closed(bus)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to a CPU")
def test_threads_that_share_one_cpu_lose_nothing(make_bus: MakeBus, backend: str) -> None:
    capacity = 4_096 if backend == "broadcast" else 16
    bus = make_bus(capacity, max_block_duration=PATIENCE_WITHOUT_END)
    subscriptions = [bus.subscribe() for _ in range(8)]
    received: list[list[int]] = [[] for _ in subscriptions]
    cpu = min(os.sched_getaffinity(0))

    def produce() -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread alone
        for event in range(2_000):
            bus.publish(event)
        bus.close()

    def consume(place: int) -> None:
        os.sched_setaffinity(0, {cpu})
        received[place] = read_to_the_end(subscriptions[place])

    threads = [threading.Thread(target=consume, args=(place,)) for place in range(8)]
    threads.append(threading.Thread(target=produce))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == [list(range(2_000))] * 8


def test_a_slow_reader_and_one_that_fails_cost_a_fast_one_nothing(make_bus: MakeBus) -> None:
    bus = make_bus(16)
    slow = bus.subscribe(policy="drop_oldest")
    failing, fast = bus.subscribe(), bus.subscribe()
    turns: queue.SimpleQueue[str] = queue.SimpleQueue()
    received: list[int] = []

    def fail() -> None:
        with failing:
            turns.put(f"failed at {failing.recv()}")
            raise ValueError

    def read() -> None:
        for event in fast:
            received.append(event)
            turns.put("fast")

    def run_and_swallow(reader: Callable[[], None]) -> None:
        with contextlib.suppress(ValueError):
            reader()

    threads = [threading.Thread(target=run_and_swallow, args=(each,)) for each in (fail, read)]
    for thread in threads:
        thread.start()
    assert bus.publish(0) == 3
    assert {turns.get(), turns.get()} == {"failed at 0", "fast"}
    threads[0].join()
    for event in range(1, 1_000):
        assert bus.publish(event) == 2
        assert turns.get() == "fast"
    bus.close()
    threads[1].join()
    assert received == list(range(1_000))
    assert_holes_exact(read_all(slow), 0, 999)
    assert_sums_closed(bus)


def test_threads_that_share_a_subscription_share_its_events(make_bus: MakeBus) -> None:
    total = 20_000
    bus = make_bus(total)
    subscription = bus.subscribe()
    received: list[list[int]] = [[] for _ in range(8)]

    def consume(place: int) -> None:
        received[place] = read_to_the_end(subscription)

    consumers = [threading.Thread(target=consume, args=(place,)) for place in range(8)]
    for thread in consumers:
        thread.start()
    for event in range(total):
        bus.publish(event)
    bus.close()
    for thread in consumers:
        thread.join()
    assert sorted(event for events in received for event in events) == list(range(total))
    assert all(events == sorted(events) for events in received)
    assert_sums_closed(bus)


def test_every_publish_that_starts_after_subscribe_returned_is_seen(make_bus: MakeBus) -> None:
    bus = make_bus(2**12)
    ended = threading.Event()
    published = 0

    def produce() -> None:
        nonlocal published
        while not ended.is_set():
            bus.publish(published)
            published += 1

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for _ in range(200):
            with bus.subscribe(policy="drop_oldest") as subscription:
                in_progress = published
                received = [_recv_or_hole(subscription) for _ in range(5)]
            first = _first_of(received)
            assert first <= in_progress + 1
            assert_holes_exact(received, first, _last_of(received))
    finally:
        ended.set()
        producer.join()
    metrics = bus.metrics()
    assert metrics.subscriber_count == 0
    assert metrics.total_published == published


def _recv_or_hole(subscription: tickbus.EventSubscription[Any]) -> int | Hole:
    try:
        event: int = subscription.recv()
    except tickbus.Lagged as lagged:
        return Hole(lagged.missed)
    return event


def _first_of(received: list[int | Hole]) -> int:
    """Returns the number of the first event that was offered, received or missed."""
    missed = 0
    for item in received:
        if not isinstance(item, Hole):
            return item - missed
        missed += item.missed
    raise AssertionError(f"only holes: {received}")


def _last_of(received: list[int | Hole]) -> int:
    sizes = [item.missed if isinstance(item, Hole) else 1 for item in received]
    return _first_of(received) + sum(sizes) - 1


Wait = Callable[[tickbus.EventSubscription[Any]], object]


@pytest.mark.parametrize(
    "wait",
    [
        lambda subscription: subscription.recv(),
        lambda subscription: subscription.recv_timeout(PATIENCE_WITHOUT_END),
        lambda subscription: subscription.recv_many(10),
    ],
    ids=["recv", "recv_timeout", "recv_many"],
)
@pytest.mark.parametrize("closed", ["bus", "subscription"])
def test_closing_frees_a_waiting_reader(make_bus: MakeBus, wait: Wait, closed: str) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    started = threading.Event()
    errors: list[type] = []

    def read() -> None:
        started.set()
        try:
            wait(subscription)
        except tickbus.Closed as error:
            errors.append(type(error))

    reader = threading.Thread(target=read)
    reader.start()
    started.wait()
    (bus if closed == "bus" else subscription).close()
    reader.join()
    assert errors == [tickbus.Closed]


@lock_free
def test_closing_the_bus_frees_blocked_publishers_with_closed(make_bus: MakeBus) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END)
    subscription = bus.subscribe(policy="block")
    bus.publish("first")
    started = threading.Barrier(5)
    errors: list[type] = []

    def produce() -> None:
        started.wait()
        try:
            bus.publish("blocked")
        except tickbus.Closed as error:
            errors.append(type(error))

    producers = [threading.Thread(target=produce) for _ in range(4)]
    for producer in producers:
        producer.start()
    started.wait()
    bus.close()
    for producer in producers:
        producer.join()
    assert errors == [tickbus.Closed] * 4
    assert read_to_the_end(subscription) == ["first"]
    assert bus.metrics().total_published == 1
    assert_sums_closed(bus)


@lock_free
@pytest.mark.parametrize("policy", ["block", "reject"])
def test_closing_a_subscription_frees_publishers_that_wait_for_it(
    make_bus: MakeBus, policy: str
) -> None:
    bus = make_bus(1)
    blocking = bus.subscribe(policy=policy)
    roomy = bus.subscribe(capacity=16)
    bus.publish("first")
    started = threading.Event()
    numbers: list[int] = []

    def produce() -> None:
        started.set()
        numbers.append(bus.publish_timeout("second", PATIENCE_WITHOUT_END))

    producer = threading.Thread(target=produce)
    producer.start()
    started.wait()
    blocking.close()
    producer.join()
    assert numbers == [1]
    assert read_all(roomy) == ["first", "second"]
    assert bus.metrics().total_dropped == 1
    assert_sums_closed(bus)


def test_blocking_calls_are_refused_on_a_thread_with_a_running_loop(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe()
    bus.publish("event")

    async def main() -> None:
        for call in (
            subscription.recv,
            lambda: subscription.recv_timeout(1.0),
            lambda: subscription.recv_many(1),
            lambda: bus.publish_timeout("event", 1.0),
        ):
            with pytest.raises(RuntimeError):
                call()

    run(main)
    assert read_all(subscription) == ["event"]
    assert bus.metrics().total_published == 1


@pytest.mark.parametrize("backend", ["lock_free"], indirect=True)
def test_a_publish_without_room_on_a_loop_points_to_publish_async_once(
    make_bus: MakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(1, max_block_duration=3600.0)
    subscription = bus.subscribe(policy="block")

    async def main() -> list[int]:
        return [bus.publish(number) for number in range(4)]

    assert run(main) == [1, 0, 0, 0]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("tickbus", "WARNING")
    assert f"bus {bus.id} " in record.getMessage()
    assert "await publish_async() instead" in record.getMessage()
    assert read_all(subscription) == [0, Hole(3)]
    assert_sums_closed(bus)


_INTERRUPTED = """
import os, signal, threading
import tickbus

bus = tickbus.LockFreeEventBus(1, tickbus.BackpressureConfig(max_block_duration=3600.0))
subscription = bus.subscribe(policy="block")
{before}
published = bus.metrics().total_published
# The timer's thread runs only if the wait has released the GIL.
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    {wait}
except KeyboardInterrupt:
    assert bus.metrics().total_published == published
    row, = bus.metrics().subscriptions
    assert row.offered == row.delivered + sum(row.dropped.values()) + row.pending
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("before", "wait"),
    [
        ("", "subscription.recv()"),
        ("", "subscription.recv_timeout(3600.0)"),
        ("", "subscription.recv_many(10)"),
        ("", "next(subscription)"),
        ("", "tickbus.select([subscription])"),
        ("bus.publish(0)", "bus.publish(1)"),
        ("bus.publish(0)", "bus.publish_timeout(1, 3600.0)"),
        ("bus.publish(0)", "bus.publish_many([1, 2])"),
    ],
)
def test_ctrl_c_ends_every_wait_and_changes_nothing(before: str, wait: str) -> None:
    child = run_child(_INTERRUPTED.format(before=before, wait=wait))
    assert (child.returncode, child.stdout) == (0, "interrupted\n"), child.stderr


def test_a_daemon_thread_that_waits_does_not_hold_up_the_interpreters_exit(backend: str) -> None:
    child = run_child(
        f"""
        import threading
        import tickbus

        bus = tickbus.EventBus({backend!r})
        subscription = bus.subscribe()
        started = threading.Event()

        def read():
            started.set()
            try:
                subscription.recv()
            except tickbus.Closed:
                pass

        threading.Thread(target=read, daemon=True).start()
        started.wait()
        print("end")
        """
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


def test_after_fork_every_call_in_the_child_is_refused(backend: str) -> None:
    child = run_child(
        f"""
        import asyncio, os
        import tickbus

        bus = tickbus.EventBus({backend!r})
        subscription = bus.subscribe()
        also = bus.subscribe_async()
        bus.publish("before")

        async def publish():
            await bus.publish_async("event")

        async def receive():
            await also.recv()

        def refused(call):
            try:
                call()
            except tickbus.ForkedError:
                return True
            return False

        process = os.fork()
        if process == 0:
            os._exit(not all([
                refused(lambda: bus.publish("event")),
                refused(lambda: bus.publish_many(["event"])),
                refused(lambda: bus.publish_timeout("event", 1.0)),
                refused(lambda: bus.subscribe()),
                refused(lambda: subscription.recv()),
                refused(lambda: subscription.try_recv()),
                refused(lambda: asyncio.run(publish())),
                refused(lambda: asyncio.run(receive())),
            ]))
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert bus.publish("after") == 2
        assert subscription.recv_many(10) == ["before", "after"]
        bus.close()
        print("end")
        """
    )
    assert (child.returncode, child.stdout) == (0, "end\n"), child.stderr


@lock_free
def test_a_signal_handler_may_publish_while_a_publisher_waits(make_bus: MakeBus) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END)
    full = bus.subscribe("full", policy="block")
    other = bus.subscribe("other")
    bus.publish("first", "full")

    def handler(*_: object) -> None:
        assert bus.publish("from the handler", "other") == 1
        assert full.try_recv() == "first"

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert bus.publish("second", "full") == 1
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert read_all(full) == ["second"]
    assert read_all(other) == ["from the handler"]
    assert_sums_closed(bus)
