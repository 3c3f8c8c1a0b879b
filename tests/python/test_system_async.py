"""The event system read and written by tasks, on every kind of loop."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import tickbus
from support import LOOPS, PATIENCE_WITHOUT_END, cancel, native_feed, spin
from tickbus import (
    EVENT_DTYPE,
    AsyncSystemSubscription,
    Closed,
    CriticalOverflow,
    Event,
    EventBatch,
    EventSystem,
    EventType,
    Lagged,
    Priority,
    WrongLoop,
)


def normal(number: int) -> Event:
    return Event(0, EventType.PriceUpdate, metadata=number)


def high(number: int) -> Event:
    return Event(0, EventType.PriceUpdate, Priority.High, metadata=number)


def stop(number: int) -> Event:
    return Event(0, EventType.EmergencyStop, metadata=number)


def numbers(events: Any) -> list[int]:
    return [event.metadata for event in events]


@contextmanager
def keeping_the_lock() -> Iterator[None]:
    """Gives the interpreter lock to no other thread meanwhile."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE_WITHOUT_END)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def wait_until(feed: Any, published: int) -> None:
    """Waits until a feed has published so many; the timeout of the test ends it."""
    while feed.published < published:
        time.sleep(0)


def test_every_form_waits_for_every_lane(any_loop: str) -> None:
    async def into(reader: AsyncSystemSubscription) -> list[Event]:
        places = np.zeros(4, EVENT_DTYPE)
        count = await reader.recv_into(places)
        return list(EventBatch(places[:count]))

    async def one(reader: AsyncSystemSubscription) -> list[Event]:
        return [await reader.recv()]

    async def following(reader: AsyncSystemSubscription) -> list[Event]:
        return [await anext(reader)]

    async def array(reader: AsyncSystemSubscription) -> list[Event]:
        return list(EventBatch(await reader.recv_array(4)))

    async def batch(reader: AsyncSystemSubscription) -> list[Event]:
        return list(await reader.recv_batch(4))

    async def many(reader: AsyncSystemSubscription) -> list[Event]:
        return await reader.recv_many(4)

    async def main() -> None:
        async with EventSystem() as system, system.subscribe_async() as reader:
            for form in (one, following, many, batch, array, into):
                for make in (normal, high, stop):
                    waiting = asyncio.create_task(form(reader))
                    await spin()
                    assert not waiting.done()
                    system.publish(make(1))
                    assert await waiting == [make(1)], form
                    # What is ready is not waited for.
                    system.publish(make(2))
                    assert await form(reader) == [make(2)], form

    asyncio.run(main())


def test_what_is_critical_is_read_first_and_iteration_ends_with_the_close(any_loop: str) -> None:
    async def main() -> None:
        system = EventSystem()
        async with system.subscribe_async() as reader:
            system.publish_batch([normal(0), high(1), stop(2), normal(3)])
            assert (reader.pending, numbers(await reader.recv_many(2))) == (4, [2, 1])
            system.close()
            assert [event.metadata async for event in reader] == [0, 3]
            with pytest.raises(Closed):
                await reader.recv()

    asyncio.run(main())


def test_python_threads_wake_sleeping_tasks(any_loop: str) -> None:
    events = [(normal, high, stop)[number % 3](number) for number in range(300)]

    def publish(system: EventSystem) -> None:
        for event in events:
            system.publish(event)

    async def main() -> None:
        with EventSystem() as system:
            readers = [system.subscribe_async() for _ in range(4)]

            async def collect(reader: AsyncSystemSubscription) -> list[int]:
                received: list[int] = []
                while len(received) < len(events):
                    received.extend(numbers(await reader.recv_many(16)))
                return received

            tasks = [asyncio.create_task(collect(reader)) for reader in readers]
            await spin()
            await asyncio.to_thread(publish, system)
            for received in await asyncio.gather(*tasks):
                for lane in range(3):
                    of_lane = [number for number in received if number % 3 == lane]
                    assert of_lane == list(range(lane, len(events), 3))
            for reader in readers:
                reader.close()

    asyncio.run(main())


def test_a_rust_thread_wakes_sleeping_tasks(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem(normal_capacity=2**12) as system:
            async with system.subscribe_async() as reader:
                # One after another, so that each finds the reader asleep.
                for number in range(50):
                    waiting = asyncio.create_task(reader.recv_array(16))
                    await spin()
                    native_feed(system, [normal(number)])
                    assert (await waiting)["metadata"].tolist() == [number]
                native_feed(system, [normal(number) for number in range(2_000)])
                received: list[int] = []
                while len(received) < 2_000:
                    received.extend((await reader.recv_array(64))["metadata"].tolist())
                assert received == list(range(2_000))

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_rust_thread_publishes_while_another_keeps_the_interpreter_lock(kind: str) -> None:
    count = 500

    async def main() -> None:
        with EventSystem() as system:
            async with system.subscribe_async() as reader:
                waiting = asyncio.create_task(reader.recv_array(count))
                await spin()
                with keeping_the_lock():
                    feed = native_feed(system, [normal(number) for number in range(count)])
                    # Who asked for the lock would wait, and so would this.
                    while feed.published < count:
                        pass
                assert not waiting.done()
                assert (await waiting)["metadata"].tolist() == list(range(count))

    # Loops without an eventfd are woken by a thread that has the lock.
    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        runner.run(main())


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the signals by which Rust threads wake it."""

    def __init__(self) -> None:
        self.signals = 0
        super().__init__()

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        def count_and_call() -> None:
            if "LoopBridge" in type(callback).__name__:
                # An eventfd counts what was written to it.
                self.signals += int.from_bytes(os.read(fd, 8), sys.byteorder)
            callback(*args)

        super().add_reader(fd, count_and_call)


def test_a_publish_signals_a_loop_once_for_all_its_subscriptions() -> None:
    async def main() -> None:
        with EventSystem() as system:
            readers = [system.subscribe_async() for _ in range(16)]
            for number, make in enumerate((normal, high, stop)):
                tasks = [asyncio.create_task(reader.recv()) for reader in readers]
                await spin()
                event_loop.signals = 0
                # The loop gets its turn when the thread is done: what it wrote is counted.
                with keeping_the_lock():
                    feed = native_feed(system, [make(number)])
                    while feed.published < 1:
                        pass
                assert await asyncio.gather(*tasks) == [make(number)] * 16
                assert event_loop.signals == 1
            for reader in readers:
                reader.close()

    event_loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: event_loop) as runner:
        runner.run(main())


def test_a_loop_that_runs_meanwhile_is_signalled_at_most_once_for_each_event() -> None:
    """Of two threads, the second may signal what the loop has just seen: it finds nothing then."""

    async def main() -> None:
        with EventSystem() as system:
            readers = [system.subscribe_async() for _ in range(16)]

            async def collect(reader: AsyncSystemSubscription) -> list[int]:
                return sorted([(await reader.recv()).metadata for _ in range(2)])

            for number in range(60):
                tasks = [asyncio.create_task(collect(reader)) for reader in readers]
                await spin()
                event_loop.signals = 0
                feeds = [
                    native_feed(system, [(normal, high, stop)[number % 3](each)]) for each in (0, 1)
                ]
                assert await asyncio.gather(*tasks) == [[0, 1]] * 16
                # Before the next events, so that no signal of these is counted among theirs.
                for feed in feeds:
                    wait_until(feed, 1)
                await spin()
                assert 1 <= event_loop.signals <= 2
            for reader in readers:
                reader.close()

    event_loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: event_loop) as runner:
        runner.run(main())


def test_cancelling_a_reader_loses_nothing(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem() as system:
            async with system.subscribe_async() as reader:
                for number in range(100):
                    first, second = (asyncio.create_task(reader.recv()) for _ in range(2))
                    await spin(2)
                    system.publish((normal, high, stop)[number % 3](number))
                    assert await cancel(first) or first.result().metadata == number
                    if first.cancelled():
                        assert (await second).metadata == number
                    else:
                        await cancel(second)
                    assert reader.pending == 0

    asyncio.run(main())


def test_tasks_of_one_subscription_compete_first_come_first_served(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem() as system:
            async with system.subscribe_async() as reader:
                tasks = [asyncio.create_task(reader.recv()) for _ in range(4)]
                await spin()
                system.publish_batch([normal(number) for number in range(4)])
                assert numbers(await asyncio.gather(*tasks)) == [0, 1, 2, 3]

    asyncio.run(main())


def test_a_hole_is_told_where_it_is(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem(1, max_block_duration=0.0) as system:
            async with system.subscribe_async() as reader:
                system.publish(stop(0))
                with pytest.raises(CriticalOverflow):
                    system.publish(stop(1))
                assert await reader.recv() == stop(0)
                with pytest.raises(Lagged) as lagged:
                    await reader.recv_array(9)
                assert (lagged.value.missed, lagged.value.lane) == (1, "critical")
                system.publish(normal(2))
                assert await reader.recv() == normal(2)

    asyncio.run(main())


def test_a_task_that_was_woken_for_nothing_is_woken_again(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem() as system:
            async with system.subscribe_async() as reader:
                for make in (normal, high, stop):
                    waiting = asyncio.create_task(reader.recv())
                    await spin()
                    for number in range(3):
                        system.publish(make(number))
                        assert reader.try_recv() == make(number)
                        await spin()
                    assert not waiting.done()
                    system.publish(make(3))
                    assert await waiting == make(3)

    asyncio.run(main())


def test_what_stands_behind_a_hole_told_to_one_task_is_for_the_next(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem(1, 1, 1, max_block_duration=0.0) as system:
            async with system.subscribe_async() as reader:
                for make in (normal, high):
                    tasks = [asyncio.create_task(reader.recv()) for _ in range(2)]
                    await spin()
                    system.publish_batch([make(0), make(1)])
                    with pytest.raises(Lagged):
                        await tasks[0]
                    assert await tasks[1] == make(1)

    asyncio.run(main())


def test_publishing_waits_its_turn_while_the_loop_runs(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system:
            async with system.subscribe_async() as slow, system.subscribe_async() as quick:
                assert await system.publish_async(normal(0)) == 2
                assert await system.publish_async(stop(1)) == 2
                assert await quick.recv() == stop(1)
                publishing = asyncio.create_task(system.publish_async(stop(2)))
                await spin()
                assert not publishing.done()
                assert await quick.recv() == stop(2), "who has room has it at once"
                assert await slow.recv() == stop(1)
                assert await publishing == 2
                assert await slow.recv() == stop(2)

    asyncio.run(main())


def test_a_thread_that_reads_wakes_a_task_that_publishes(any_loop: str) -> None:
    async def main() -> None:
        with (
            EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system,
            system.subscribe() as reader,
        ):
            received: list[int] = []
            thread = threading.Thread(target=lambda: received.extend(numbers(reader)))
            await system.publish_async(stop(0))
            publishing = asyncio.create_task(system.publish_async(stop(1)))
            await spin()
            thread.start()
            assert await publishing == 1
            for number in range(2, 100):
                await system.publish_async(stop(number))
            system.close()
            await asyncio.to_thread(thread.join)
            assert received == list(range(100))

    asyncio.run(main())


def test_patience_of_a_task_ends_and_names_who_misses_the_event(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem(1, max_block_duration=0.001) as system, system.subscribe() as full:
            await system.publish_async(stop(0))
            with pytest.raises(CriticalOverflow) as caught:
                await system.publish_async(stop(1))
            assert caught.value.missing == (full.id,)
            system.handle_critical_overflow(lambda overflow: None)
            assert await system.publish_async(stop(2)) == 0

    asyncio.run(main())


def test_a_cancelled_publication_is_nobodys_or_is_told(any_loop: str) -> None:
    async def main() -> None:
        with (
            EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system,
            system.subscribe() as full,
        ):
            system.publish(stop(0))
            publishing = asyncio.create_task(system.publish_async(stop(1)))
            await spin()
            assert await cancel(publishing)
            assert full.try_recv() == stop(0)
            assert full.try_recv() is None
            system.publish(stop(2))
            with system.subscribe() as free:
                publishing = asyncio.create_task(system.publish_async(stop(3)))
                await spin()
                assert await cancel(publishing)
                assert free.try_recv() == stop(3)
            assert full.try_recv() == stop(2)
            with pytest.raises(Lagged):
                full.try_recv()

    asyncio.run(main())


def test_a_subscription_belongs_to_one_live_loop_and_rebinds_when_that_is_closed() -> None:
    system = EventSystem()
    reader = system.subscribe_async()

    async def receive(number: int) -> None:
        task = asyncio.create_task(reader.recv())
        await spin()
        system.publish(normal(number))
        assert await task == normal(number)

    async def refuse() -> None:
        with pytest.raises(WrongLoop, match="awaited from two event loops"):
            await reader.recv()

    asyncio.run(receive(1))
    with asyncio.Runner() as runner:
        runner.run(receive(2))
        thread = threading.Thread(target=lambda: asyncio.run(refuse()))
        thread.start()
        thread.join()
        runner.run(receive(3))
    asyncio.run(receive(4))
    reader.close()


def test_a_full_subscription_whose_loop_has_closed_is_closed(any_loop: str) -> None:
    with EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system:
        reader = system.subscribe_async()

        async def main() -> None:
            system.publish(stop(0))
            await reader.recv()
            task = asyncio.create_task(reader.recv())
            await spin()
            await cancel(task)
            task = asyncio.create_task(reader.recv())
            await spin()
            system.publish(stop(1))
            assert await task == stop(1)

        asyncio.run(main())
        assert system.publish(stop(2)) == 1
        assert system.publish(stop(3)) == 0, "it waits for nobody"
        assert reader.closed


def test_a_busy_reader_lets_other_tasks_run(any_loop: str) -> None:
    async def main() -> None:
        with EventSystem() as system:
            async with system.subscribe_async() as reader:
                system.publish_batch([normal(number) for number in range(1_000)])
                turns = 0

                async def other() -> None:
                    nonlocal turns
                    while reader.pending:
                        turns += 1
                        await asyncio.sleep(0)

                task = asyncio.create_task(other())
                for _ in range(1_000):
                    await reader.recv()
                await task
                assert turns >= 3

    asyncio.run(main())


def test_an_abandoned_reader_is_collected() -> None:
    async def main() -> list[weakref.ref[Any]]:
        system = EventSystem()
        reader = system.subscribe_async()
        task = asyncio.create_task(reader.recv())
        await spin()
        await cancel(task)
        reader.close()
        return [weakref.ref(system), weakref.ref(reader)]

    gone = asyncio.run(main())
    gc.collect()
    assert [weak() for weak in gone] == [None, None]


def test_busy_polling_sees_what_a_rust_thread_publishes() -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("busy-polling needs two CPUs")

    async def main() -> None:
        with EventSystem() as system:
            async with system.subscribe_async() as reader, tickbus.BusyPoll(0.001, adaptive=False):
                for number in range(50):
                    waiting = asyncio.create_task(reader.recv())
                    await spin(2)
                    native_feed(system, [normal(number)])
                    assert await waiting == normal(number)

    asyncio.run(main())


def test_the_numbers_close_between_rust_threads_and_tasks(any_loop: str) -> None:
    count = 3_000
    events = [(normal, high, stop)[number % 3](number) for number in range(count)]

    async def main() -> None:
        with EventSystem(64, 64, 64, max_block_duration=PATIENCE_WITHOUT_END) as system:
            readers = [system.subscribe_async(on_lag="count") for _ in range(3)]

            async def collect(reader: AsyncSystemSubscription) -> int:
                critical = 0
                while True:
                    try:
                        events = await reader.recv_array(32)
                    except Closed:
                        return critical
                    critical += int((events["event_type"] >= 128).sum())

            tasks = [asyncio.create_task(collect(reader)) for reader in readers]
            feeds = [native_feed(system, events) for _ in range(2)]
            for feed in feeds:
                await asyncio.to_thread(wait_until, feed, count)
            assert await system.aclose(drain=PATIENCE_WITHOUT_END) == 0
            assert await asyncio.gather(*tasks) == [2 * count // 3] * 3
            metrics = system.metrics()
            for lane in (metrics.critical, metrics.high, metrics.normal):
                for row in lane.subscriptions:
                    assert row.offered == row.delivered + sum(row.dropped.values()) == 2_000
            for reader in readers:
                reader.close()

    asyncio.run(main())


def test_waiting_for_the_end_of_a_thread_is_no_part_of_the_loop() -> None:
    """A loop that closes while a Rust thread publishes leaves nothing to be told."""
    system = EventSystem()
    reader = system.subscribe_async()

    async def main() -> Any:
        task = asyncio.create_task(reader.recv())
        await spin()
        feed = native_feed(system, [normal(number) for number in range(20_000)])
        await task
        return feed

    wait_until(asyncio.run(main()), 20_000)
    reader.close()
    system.close()
