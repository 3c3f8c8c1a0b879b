"""The asyncio bridge: what takes `recv()` directly, cancelling, competing, fairness, the end."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import tickbus
from support import Hole, MakeBus, assert_sums_closed, cancel, read_all, run, spin

pytestmark = pytest.mark.usefixtures("any_loop")

CANCELLATIONS = 20_000
WAITERS = 5
ROUND = 256
"""Consecutive ready completions after which a receive gives way to the loop."""

AsyncSubscription = tickbus.AsyncEventSubscription[Any]


async def _with_create_task(subscription: AsyncSubscription) -> object:
    return await asyncio.create_task(subscription.recv())


async def _with_task_group(subscription: AsyncSubscription) -> object:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(subscription.recv())
    return task.result()


async def _with_wait_for(subscription: AsyncSubscription) -> object:
    return await asyncio.wait_for(subscription.recv(), 60)


async def _with_gather(subscription: AsyncSubscription) -> object:
    (event,) = await asyncio.gather(subscription.recv())
    return event


async def _with_timeout(subscription: AsyncSubscription) -> object:
    async with asyncio.timeout(60):
        return await subscription.recv()


async def _with_plain_await(subscription: AsyncSubscription) -> object:
    return await subscription.recv()


@pytest.mark.parametrize("ready", [True, False], ids=["ready", "waiting"])
@pytest.mark.parametrize(
    "take",
    [
        _with_plain_await,
        _with_create_task,
        _with_task_group,
        _with_wait_for,
        _with_gather,
        _with_timeout,
    ],
    ids=lambda take: take.__name__.removeprefix("_with_"),
)
def test_asyncio_takes_recv_directly(
    make_bus: MakeBus, take: Callable[[AsyncSubscription], Awaitable[object]], ready: bool
) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> object:
        if ready:
            bus.publish("event")
        else:
            asyncio.get_running_loop().call_soon(bus.publish, "event")
        return await take(subscription)

    assert asyncio.run(main()) == "event"
    assert_sums_closed(bus)


def test_asyncio_takes_recv_many_and_publish_async_directly(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> None:
        batch = asyncio.create_task(subscription.recv_many(10))
        await spin()
        async with asyncio.TaskGroup() as group:
            published = group.create_task(bus.publish_async("event"))
        assert published.result() == 1
        assert await asyncio.wait_for(batch, 60) == ["event"]

    asyncio.run(main())


def test_a_subscription_is_made_outside_a_loop_and_read_in_several_one_after_another(
    make_bus: MakeBus,
) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    for event in range(5):
        bus.publish(event)
        assert run(subscription.recv) == event

    async def wait_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(subscription.recv(), 0.001)

    for event in range(5):
        asyncio.run(wait_in_vain())
        bus.publish(event)
        assert run(subscription.recv) == event


def test_recv_many_waits_for_the_first_and_takes_what_is_there(make_bus: MakeBus) -> None:
    bus = make_bus(16)
    subscription = bus.subscribe_async()

    async def main() -> None:
        waiting = asyncio.create_task(subscription.recv_many(4))
        await spin()
        assert not waiting.done()
        for event in range(6):
            bus.publish(event)
        assert await waiting == [0, 1, 2, 3]
        assert await subscription.recv_many(4) == [4, 5]

    asyncio.run(main())
    assert_sums_closed(bus)


def test_a_batch_ends_before_a_hole_and_the_next_one_tells_it(make_bus: MakeBus) -> None:
    bus = make_bus(4)
    subscription = bus.subscribe_async(policy="drop_oldest")

    async def main() -> None:
        for event in range(6):
            bus.publish(event)
        with pytest.raises(tickbus.Lagged) as caught:
            await subscription.recv_many(100)
        assert caught.value.missed == 2
        assert await subscription.recv_many(100) == [2, 3, 4, 5]

    asyncio.run(main())
    assert_sums_closed(bus)


def test_async_for_ends_after_the_close_when_everything_was_read(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> list[int]:
        reader = asyncio.create_task(_collect(subscription))
        for event in range(5):
            bus.publish(event)
        await spin()
        bus.publish(5)
        bus.publish(6)
        bus.close()
        return await reader

    assert asyncio.run(main()) == list(range(7))
    assert_sums_closed(bus)


def test_lagged_out_of_async_for_leaves_the_subscription_open(make_bus: MakeBus) -> None:
    bus = make_bus(2)
    subscription = bus.subscribe_async(policy="drop_oldest")

    async def main() -> list[Any]:
        received: list[Any] = []
        for event in range(5):
            bus.publish(event)
        with pytest.raises(tickbus.Lagged) as caught:
            await _collect(subscription)
        received.append(Hole(caught.value.missed))
        assert not subscription.closed
        bus.close()
        return received + await _collect(subscription)

    assert asyncio.run(main()) == [Hole(3), 3, 4]


def test_closing_the_bus_wakes_every_waiter(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> None:
        waiters = [asyncio.create_task(subscription.recv()) for _ in range(3)]
        batch = asyncio.create_task(subscription.recv_many(3))
        await spin()
        bus.close()
        results = await asyncio.gather(*waiters, batch, return_exceptions=True)
        assert [type(result) for result in results] == [tickbus.Closed] * 4
        with pytest.raises(tickbus.Closed):
            await subscription.recv()

    asyncio.run(main())


def test_closing_from_another_thread_wakes_the_loop(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> None:
        waiter = asyncio.create_task(subscription.recv())
        await spin()
        closer = threading.Thread(target=bus.close)
        closer.start()
        with pytest.raises(tickbus.Closed):
            await waiter
        closer.join()

    asyncio.run(main())


def test_closing_the_subscription_wakes_its_waiters_only(make_bus: MakeBus) -> None:
    bus = make_bus()
    ending, staying = bus.subscribe_async(), bus.subscribe_async()

    async def main() -> None:
        first = asyncio.create_task(ending.recv())
        second = asyncio.create_task(staying.recv())
        await spin()
        await ending.aclose()
        with pytest.raises(tickbus.Closed):
            await first
        assert bus.publish("event") == 1
        assert await second == "event"

    asyncio.run(main())
    assert ending.closed
    assert bus.metrics().subscriber_count == 1


def test_context_managers_close(make_bus: MakeBus) -> None:
    async def main() -> None:
        async with make_bus() as bus:
            async with bus.subscribe_async() as subscription:
                bus.publish("event")
                assert await subscription.recv() == "event"
            assert subscription.closed
            assert not bus.closed
        assert bus.closed

    asyncio.run(main())


def test_a_publish_from_another_thread_wakes_a_sleeping_loop(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    turn: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def produce() -> None:
        while (event := turn.get()) is not None:
            bus.publish(event)

    async def main() -> None:
        for event in range(500):
            waiter = asyncio.create_task(subscription.recv())
            await asyncio.sleep(0)
            turn.put(event)
            assert await waiter == event

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        asyncio.run(main())
    finally:
        turn.put(None)
        producer.join()
    assert_sums_closed(bus)


def test_several_loops_in_several_threads_read_one_bus(make_bus: MakeBus) -> None:
    last = 5_000
    bus = make_bus(2 * last)
    subscriptions = [bus.subscribe_async() for _ in range(4)]
    results: dict[int, list[int]] = {}

    def read(place: int) -> None:
        results[place] = asyncio.run(_collect(subscriptions[place]))

    readers = [threading.Thread(target=read, args=(place,)) for place in range(4)]
    for reader in readers:
        reader.start()
    for event in range(last):
        assert bus.publish(event) == 4
    bus.close()
    for reader in readers:
        reader.join()
    assert results == {place: list(range(last)) for place in range(4)}
    assert_sums_closed(bus)


def test_two_buses_in_two_loops_run_only_their_own_tasks(make_bus: MakeBus) -> None:
    buses = [make_bus(4_096), make_bus(4_096)]
    ran_in: list[set[int]] = [set(), set()]
    received: list[list[int]] = [[], []]
    threads: dict[int, int] = {}
    both_read = threading.Barrier(2)

    def run_loop(place: int) -> None:
        threads[place] = threading.get_ident()

        async def main() -> None:
            async with buses[place].subscribe_async() as subscription:
                both_read.wait()
                while len(received[place]) < 1_000:
                    # Each loop publishes to the bus of the other.
                    await buses[1 - place].publish_async(len(received[place]))
                    received[place].append(await subscription.recv())
                    ran_in[place].add(threading.get_ident())

        asyncio.run(main())

    loops = [threading.Thread(target=run_loop, args=(place,)) for place in range(2)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    assert received == [list(range(1_000))] * 2
    assert ran_in == [{threads[0]}, {threads[1]}]


def test_a_subscription_awaited_from_two_live_loops_is_a_wrong_loop(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    waiting, refused = threading.Event(), threading.Event()

    async def wait() -> object:
        waiter = asyncio.create_task(subscription.recv())
        await spin()
        waiting.set()
        await asyncio.to_thread(refused.wait)
        return await waiter

    first = threading.Thread(target=asyncio.run, args=(wait(),))
    first.start()
    waiting.wait()
    try:
        with pytest.raises(tickbus.WrongLoop):
            run(subscription.recv)
    finally:
        refused.set()
        bus.publish("event")
        first.join()
    assert_sums_closed(bus)


def test_waiters_compete_first_come_first_served(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> list[int]:
        waiters = [asyncio.create_task(subscription.recv()) for _ in range(10)]
        await spin()
        for event in range(10):
            bus.publish(event)
        return await asyncio.gather(*waiters)

    assert asyncio.run(main()) == list(range(10))
    assert_sums_closed(bus)


def test_what_stands_behind_a_hole_told_to_one_waiter_is_for_the_next(make_bus: MakeBus) -> None:
    bus = make_bus(1)

    async def main() -> None:
        subscription = bus.subscribe_async(policy="drop_oldest")
        first, second = (asyncio.create_task(subscription.recv()) for _ in range(2))
        await spin()
        bus.publish_many([1, 2])
        with pytest.raises(tickbus.Lagged):
            await first
        assert await second == 2
        assert_sums_closed(bus)

    run(main)


def test_a_woken_and_cancelled_waiter_passes_its_event_on(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> None:
        first, second = (asyncio.create_task(subscription.recv()) for _ in range(2))
        await spin()
        bus.publish("event")
        first.cancel()
        assert await second == "event"
        assert first.cancelled()

    asyncio.run(main())
    assert_sums_closed(bus)


def test_a_failing_sibling_in_a_task_group_loses_nothing(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def fail() -> None:
        await spin()
        bus.publish("event")
        raise LookupError

    async def receive() -> None:
        received.append(await subscription.recv())

    async def receive_beside_a_failure() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(receive())
            group.create_task(fail())

    received: list[object] = []
    with pytest.raises(ExceptionGroup):
        asyncio.run(receive_beside_a_failure())
    assert received + read_all(subscription) == ["event"]
    assert_sums_closed(bus)


def test_a_recv_that_is_never_awaited_takes_nothing(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    bus.publish("event")
    forgotten = subscription.recv()
    del forgotten
    closed = subscription.recv()
    closed.close()
    assert subscription.pending == 1
    assert read_all(subscription) == ["event"]


def test_one_recv_is_awaited_once(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def main() -> None:
        bus.publish("first")
        bus.publish("second")
        awaitable = subscription.recv()
        assert await awaitable == "first"
        with pytest.raises(RuntimeError):
            await awaitable
        assert await subscription.recv() == "second"

    asyncio.run(main())


def test_cancelling_recv_loses_nothing(make_bus: MakeBus, any_loop: str) -> None:
    _cancel_at_random(make_bus, any_loop, from_thread=False, seed=random.randrange(2**32))


def test_cancelling_recv_while_another_thread_publishes_loses_nothing(
    make_bus: MakeBus, any_loop: str
) -> None:
    _cancel_at_random(make_bus, any_loop, from_thread=True, seed=random.randrange(2**32))


def _cancel_at_random(make_bus: MakeBus, loop: str, *, from_thread: bool, seed: int) -> None:
    """Cancels competing waiters at random points: every event is received once, in order."""
    print(f"seed={seed}")
    rng = random.Random(seed)
    bus = make_bus(2**18)
    subscription = bus.subscribe_async()
    received: list[int] = []
    requests: queue.SimpleQueue[int] = queue.SimpleQueue()
    # A loop that debugs records a stack for each task.
    cancellations = CANCELLATIONS if loop != "debug" else CANCELLATIONS // 20
    published = 0
    cancelled = 0

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
            if rng.random() < 0.8:
                received.append(await subscription.recv())
            else:
                received.extend(await subscription.recv_many(3))

    async def main() -> None:
        nonlocal cancelled
        waiters = [asyncio.create_task(wait()) for _ in range(WAITERS)]
        while cancelled < cancellations:
            count = rng.randrange(4)
            requests.put(count) if from_thread else publish(count)
            await spin(rng.randrange(3))
            for place in rng.sample(range(WAITERS), rng.randrange(1, WAITERS + 1)):
                cancelled += await cancel(waiters[place])
                waiters[place] = asyncio.create_task(wait())
        requests.put(-1)
        await asyncio.to_thread(producer.join)
        while len(received) < published:
            await spin()
        for waiter in waiters:
            await cancel(waiter)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        asyncio.run(main())
    finally:
        requests.put(-1)
        producer.join()
    assert cancelled >= cancellations
    assert received == list(range(published))
    assert_sums_closed(bus)


def test_wait_for_that_times_out_loses_nothing(make_bus: MakeBus) -> None:
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    bus = make_bus(4096)
    subscription = bus.subscribe_async()
    received: list[int] = []
    total = 1_000
    timed_out = 0

    def produce() -> None:
        for event in range(total):
            bus.publish(event)
            for _ in range(rng.randrange(2_000)):
                pass

    async def main() -> None:
        nonlocal timed_out
        producer = threading.Thread(target=produce)
        producer.start()
        while len(received) < total:
            try:
                received.append(await asyncio.wait_for(subscription.recv(), 1e-5))
            except TimeoutError:
                timed_out += 1
        producer.join()

    asyncio.run(main())
    assert received == list(range(total))
    assert_sums_closed(bus)


@pytest.mark.parametrize("form", ["recv", "async_for"])
def test_a_busy_reader_lets_the_loop_run(make_bus: MakeBus, form: str) -> None:
    total = 8 * ROUND
    bus = make_bus(total)
    subscription = bus.subscribe_async()
    for event in range(total):
        bus.publish(event)
    bus.close()

    async def read() -> list[int]:
        if form == "recv":
            return [await subscription.recv() for _ in range(total)]
        return await _collect(subscription)

    received, ticks = asyncio.run(_count_ticks_during(read))
    assert received == list(range(total))
    assert ticks >= total // ROUND - 1


def test_a_busy_async_publisher_lets_the_loop_run(make_bus: MakeBus) -> None:
    total = 8 * ROUND
    bus = make_bus(total)
    subscription = bus.subscribe()

    async def publish() -> list[int]:
        return [await bus.publish_async(event) for event in range(total)]

    numbers, ticks = asyncio.run(_count_ticks_during(publish))
    assert numbers == [1] * total
    assert ticks >= total // ROUND - 1
    assert read_all(subscription) == list(range(total))


async def _count_ticks_during(work: Callable[[], Awaitable[list[int]]]) -> tuple[list[int], int]:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0)
    before = ticks
    result = await work()
    counted = ticks - before
    await cancel(ticker)
    return result, counted


def test_aclose_waits_until_everything_was_read(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    for event in range(3):
        bus.publish(event)

    async def main() -> None:
        draining = asyncio.create_task(bus.aclose(drain=3_600))
        await spin()
        assert bus.closed
        assert not draining.done()
        assert await _collect(subscription) == [0, 1, 2]
        assert await draining == 0

    asyncio.run(main())


def test_aclose_without_drain_tells_what_is_pending(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    bus.publish("event")
    assert run(bus.aclose) == 1
    assert bus.closed
    assert read_all(subscription) == ["event"]


@pytest.mark.parametrize("drain", [-1.0, float("nan"), float("inf")])
def test_aclose_refuses_a_drain_that_is_no_duration(make_bus: MakeBus, drain: float) -> None:
    bus = make_bus()
    with pytest.raises(tickbus.ConfigError, match="drain"):
        run(lambda: bus.aclose(drain))
    assert not bus.closed


async def _collect(subscription: AsyncSubscription) -> list[Any]:
    return [event async for event in subscription]
