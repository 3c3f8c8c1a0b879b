"""Event loops that end before their subscriptions, raw signal handlers, and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import signal
import threading
from collections.abc import Callable

import pytest
import uvloop

import tickbus
from support import (
    PATIENCE_WITHOUT_END,
    MakeBus,
    assert_sums_closed,
    cancel,
    read_all,
    run_child,
    spin,
)

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
WAITERS = 5
CANCELLATIONS = 100_000

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)
policies = pytest.mark.parametrize("policy", ["block", "reject"])
loops = pytest.mark.parametrize("loop", LOOPS)

AsyncSubscription = tickbus.AsyncEventSubscription[object]


def _read_one(bus: tickbus.EventBus[object], subscription: AsyncSubscription, loop: str) -> None:
    """Reads an event in a loop that has ended afterwards."""

    async def main() -> object:
        waiter = asyncio.ensure_future(_recv(subscription))
        await spin()
        bus.publish("read")
        return await waiter

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(main()) == "read"


async def _recv(subscription: AsyncSubscription) -> object:
    return await subscription.recv()


@lock_free
@loops
@policies
@pytest.mark.parametrize(
    "publish",
    [
        lambda bus: bus.publish("event"),
        lambda bus: bus.publish_timeout("event", PATIENCE_WITHOUT_END),
        lambda bus: bus.publish_many(["event"]),
        lambda bus: asyncio.run(_publish_async(bus)),
        lambda bus: asyncio.run(_publish_on_a_loop(bus)),
    ],
    ids=["publish", "publish_timeout", "publish_many", "publish_async", "publish_on_a_loop"],
)
def test_a_full_subscription_whose_loop_has_closed_is_closed_by_the_publisher_that_finds_it(
    make_bus: MakeBus, loop: str, policy: str, publish: Callable[[tickbus.EventBus[object]], int]
) -> None:
    bus = make_bus(2, max_block_duration=PATIENCE_WITHOUT_END)
    abandoned, other = bus.subscribe_async(policy=policy), bus.subscribe(capacity=16)
    _read_one(bus, abandoned, loop)
    assert bus.publish_many(["kept", "kept"]) == 2
    assert not abandoned.closed
    assert publish(bus) == 1
    assert abandoned.closed
    assert read_all(other) == ["read", "kept", "kept", "event"]
    metrics = bus.metrics()
    assert (metrics.subscriber_count, metrics.total_dropped) == (1, 2)
    with pytest.raises(tickbus.Closed):
        abandoned.try_recv()
    assert_sums_closed(bus)


async def _publish_async(bus: tickbus.EventBus[object]) -> int:
    return await bus.publish_async("event")


async def _publish_on_a_loop(bus: tickbus.EventBus[object]) -> int:
    return bus.publish("event")


@lock_free
def test_a_loop_that_ends_after_the_patience_with_its_reader_is_found_too(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(1)
    subscription = bus.subscribe_async(policy="block")

    async def main() -> None:
        waiter = asyncio.create_task(_recv(subscription))
        await spin()
        await cancel(waiter)
        bus.publish("kept")
        assert await asyncio.to_thread(bus.publish, "missed") == 0

    asyncio.run(main())
    assert not subscription.closed
    assert bus.publish("after the loop") == 0
    assert subscription.closed
    # One missed without patience, and one pending when it was closed; the last was not offered.
    assert bus.metrics().total_dropped == 2


@lock_free
@policies
def test_a_publisher_that_waits_when_the_loop_closes_goes_on(
    make_bus: MakeBus, policy: str
) -> None:
    bus = make_bus(1, max_block_duration=PATIENCE_WITHOUT_END)
    subscription = bus.subscribe_async(policy=policy)
    loop = asyncio.new_event_loop()
    waiter = loop.create_task(_recv(subscription))
    loop.run_until_complete(spin())
    loop.run_until_complete(cancel(waiter))
    bus.publish("kept")
    numbers: list[int] = []
    started = threading.Event()

    def publish() -> None:
        started.set()
        numbers.append(bus.publish_timeout("event", PATIENCE_WITHOUT_END))

    publisher = threading.Thread(target=publish)
    publisher.start()
    started.wait()
    assert not subscription.closed
    loop.close()
    publisher.join()
    assert numbers == [0]
    assert subscription.closed


@lock_free
def test_a_full_subscription_that_was_never_read_on_a_loop_is_left_alone(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(1)
    blocking = bus.subscribe_async(policy="block")
    rejecting = bus.subscribe_async("refused", policy="reject")
    assert bus.publish("first") == 1
    assert bus.publish("missed") == 0
    bus.publish("first", "refused")
    with pytest.raises(tickbus.Full):
        bus.publish("refused", "refused")
    assert not blocking.closed
    assert not rejecting.closed
    asyncio.run(_drain(blocking))
    assert_sums_closed(bus)


@lock_free
@loops
def test_a_full_subscription_whose_loop_lives_is_left_alone(make_bus: MakeBus, loop: str) -> None:
    bus = make_bus(1)
    blocking = bus.subscribe_async(policy="block")
    rejecting = bus.subscribe_async("refused", policy="reject")

    async def main() -> None:
        for subscription in (blocking, rejecting):
            waiter = asyncio.create_task(_recv(subscription))
            await spin()
            await cancel(waiter)
        bus.publish("kept", "refused")
        assert await asyncio.to_thread(bus.publish, "missed") == 0
        with pytest.raises(tickbus.Full):
            await asyncio.to_thread(bus.publish, "refused", "refused")
        assert (blocking.closed, rejecting.closed) == (False, False)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
    assert_sums_closed(bus)


@lock_free
def test_a_subscription_with_room_outlives_its_loop(make_bus: MakeBus) -> None:
    bus = make_bus(8)
    subscription = bus.subscribe_async()
    _read_one(bus, subscription, "asyncio")
    bus.publish("between the loops")
    assert asyncio.run(_recv(subscription)) == "between the loops"
    assert not subscription.closed


async def _drain(subscription: AsyncSubscription) -> None:
    while subscription.pending:
        with contextlib.suppress(tickbus.Lagged):
            await subscription.recv()


@loops
@pytest.mark.parametrize("end", ["publish('event')", "close()"])
def test_a_raw_signal_handler_wakes_the_loop_that_sleeps_on_its_own_thread(
    backend: str, loop: str, end: str
) -> None:
    child = run_child(
        f"""
        import asyncio, faulthandler, signal
        import uvloop
        import tickbus

        # A loop that is not woken sleeps for ever: nothing else would wake it.
        faulthandler.dump_traceback_later(10, exit=True)
        bus = tickbus.EventBus({backend!r})
        subscription = bus.subscribe_async()
        signal.signal(signal.SIGALRM, lambda *_: bus.{end})

        async def main():
            waiter = asyncio.ensure_future(read())
            await asyncio.sleep(0)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            return await waiter

        async def read():
            try:
                return await subscription.recv()
            except tickbus.Closed:
                return "closed"

        with asyncio.Runner(
            loop_factory={{"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}}[
                {loop!r}
            ]
        ) as runner:
            print(runner.run(main()))
        bus.close()
        """
    )
    expected = "event\n" if "publish" in end else "closed\n"
    assert (child.returncode, child.stdout) == (0, expected), child.stderr


@pytest.mark.parametrize("backend", ["lock_free", "broadcast"], indirect=True)
def test_a_signal_handler_may_publish_and_read_in_the_middle_of_every_call(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(4, drop_oldest=True)
    subscription = bus.subscribe(on_lag="count")
    tasks = bus.subscribe_async(on_lag="count")
    handled = 0

    def handler(*_: object) -> None:
        nonlocal handled
        handled += 1
        bus.publish("from the handler")
        subscription.try_recv()
        tasks.try_recv()
        with bus.subscribe(on_lag="count") as short:  # where calls are slow, handlers nest
            bus.publish("again")
            short.try_recv()

    async def publish_and_read() -> None:
        while handled < 200:
            bus.publish("event")
            bus.publish_many(["event"] * 3)
            await bus.publish_async("event")
            subscription.try_recv()
            await tasks.recv_many(2)
            bus.metrics()

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        asyncio.run(publish_and_read())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert_sums_closed(bus)


@loops
@pytest.mark.parametrize("publishes", ["on_the_loop", "in_a_thread"])
def test_a_hundred_thousand_cancellations_lose_and_double_nothing(
    make_bus: MakeBus, loop: str, publishes: str
) -> None:
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    bus = make_bus(2**19)
    subscription = bus.subscribe_async()
    received: list[object] = []
    requests: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiters: list[asyncio.Task[None]] = []
    published = cancelled = 0

    def publish(count: int) -> None:
        nonlocal published
        for _ in range(count):
            bus.publish(published)
            published += 1

    def produce() -> None:
        while (count := requests.get()) >= 0:
            publish(count)

    async def wait() -> None:
        while True:
            kind = rng.random()
            if kind < 0.6:
                received.append(await subscription.recv())
            elif kind < 0.9:
                received.extend(await subscription.recv_many(3))
            else:
                # From inside a step, in the middle of a wake-up perhaps.
                received.append(await subscription.recv())
                rng.choice(waiters).cancel()

    async def main() -> None:
        nonlocal cancelled
        waiters.extend(asyncio.create_task(wait()) for _ in range(WAITERS))
        while cancelled < CANCELLATIONS:
            count = rng.randrange(4)
            requests.put(count) if publishes == "in_a_thread" else publish(count)
            await spin(rng.randrange(3))
            for place in rng.sample(range(WAITERS), rng.randrange(1, WAITERS + 1)):
                cancelled += await cancel(waiters[place])
                waiters[place] = asyncio.create_task(wait())
        requests.put(-1)
        await asyncio.to_thread(producer.join)
        while len(received) < published:
            await spin()
            for place, waiter in enumerate(waiters):
                if waiter.done():
                    waiters[place] = asyncio.create_task(wait())
        for waiter in waiters:
            await cancel(waiter)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(main())
    finally:
        requests.put(-1)
        producer.join()
    assert cancelled >= CANCELLATIONS
    assert received == list(range(published))
    assert_sums_closed(bus)
