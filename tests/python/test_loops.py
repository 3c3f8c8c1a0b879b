"""How sleeping tasks are woken: directly, in their contexts, in every kind of event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import sys
import threading
from typing import Any

import pytest

import tickbus
from support import LOOPS, LoopWithoutReaders, MakeBus, assert_sums_closed, run_child, spin

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)


def test_each_task_is_stepped_in_its_own_context(make_bus: MakeBus, any_loop: str) -> None:
    bus = make_bus()
    name = contextvars.ContextVar[int]("name")
    seen = []

    async def read(number: int, subscription: tickbus.AsyncEventSubscription[Any]) -> None:
        name.set(number)
        for _ in range(3):
            await subscription.recv()
            seen.append(name.get() == number)

    async def main() -> None:
        subscriptions = [bus.subscribe_async() for _ in range(5)]
        async with asyncio.TaskGroup() as group:
            for number, subscription in enumerate(subscriptions):
                group.create_task(read(number, subscription))
            for event in range(3):
                await spin()
                bus.publish(event)

    asyncio.run(main())
    assert seen == [True] * 15


def test_tasks_that_share_one_context_are_all_woken(make_bus: MakeBus, any_loop: str) -> None:
    bus = make_bus()

    async def main() -> list[object]:
        context = contextvars.copy_context()
        subscriptions = [bus.subscribe_async() for _ in range(5)]
        tasks = [
            asyncio.get_running_loop().create_task(subscription.recv(), context=context)
            for subscription in subscriptions
        ]
        await spin()
        bus.publish("event")
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ["event"] * 5


def test_more_sleepers_than_are_stepped_in_one_go_are_all_woken(
    make_bus: MakeBus, any_loop: str
) -> None:
    bus = make_bus()
    number = 200

    async def main() -> list[object]:
        subscriptions = [bus.subscribe_async() for _ in range(number)]
        tasks = [asyncio.create_task(subscription.recv()) for subscription in subscriptions]
        await spin()
        thread = threading.Thread(target=bus.publish, args=("event",))
        thread.start()
        events = await asyncio.gather(*tasks)
        thread.join()
        return events

    assert asyncio.run(main()) == ["event"] * number
    assert_sums_closed(bus)


def test_tasks_written_in_python_are_woken_and_cancelled_as_those_written_in_c(
    make_bus: MakeBus, any_loop: str
) -> None:
    bus = make_bus()
    python_task = getattr(asyncio.tasks, "_PyTask")  # noqa: B009 - typeshed lacks it

    def in_python(loop: Any, coroutine: Any, **options: Any) -> Any:
        return python_task(coroutine, loop=loop, **options)

    async def main() -> list[object]:
        asyncio.get_running_loop().set_task_factory(in_python)
        subscription = bus.subscribe_async()
        tasks = [asyncio.create_task(subscription.recv()) for _ in range(3)]
        assert {type(task) for task in tasks} == {python_task}
        await spin()
        tasks[1].cancel()
        bus.publish("from the loop")
        thread = threading.Thread(target=bus.publish, args=("from a thread",))
        thread.start()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        thread.join()
        return results

    woken, cancelled, last = asyncio.run(main())
    assert (woken, last) == ("from the loop", "from a thread")
    assert isinstance(cancelled, asyncio.CancelledError)
    assert_sums_closed(bus)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_one_woken_task_leaves_the_others_woken(
    make_bus: MakeBus, interrupt: type[BaseException]
) -> None:
    bus = make_bus()
    received = []

    async def read(subscription: tickbus.AsyncEventSubscription[Any], interrupted: bool) -> None:
        event = await subscription.recv()
        if interrupted:
            raise interrupt
        received.append(event)

    loop = asyncio.new_event_loop()
    subscriptions = [bus.subscribe_async() for _ in range(4)]
    tasks = [
        loop.create_task(read(subscription, place == 1))
        for place, subscription in enumerate(subscriptions)
    ]
    loop.run_until_complete(spin())
    bus.publish("event")
    with pytest.raises(interrupt):
        loop.run_until_complete(spin())
    loop.run_until_complete(spin())
    assert received == ["event"] * 3
    with pytest.raises(interrupt):
        tasks[1].result()
    loop.close()


def test_a_waiter_of_a_loop_that_has_ended_takes_no_wake_up(
    make_bus: MakeBus, any_loop: str
) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    ended = LOOPS[any_loop]()
    abandoned = ended.create_task(subscription.recv())
    ended.run_until_complete(spin())
    ended.close()

    async def main() -> object:
        task = asyncio.create_task(subscription.recv())
        await spin()
        bus.publish("event")
        return await task

    assert asyncio.run(main()) == "event"
    assert not abandoned.done()
    # A loop that has ended cannot tell its task so: it is dropped, as asyncio says when it is.
    abandoned._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_suspended_task_that_nobody_holds_is_collected_with_its_subscription(
    make_bus: MakeBus,
) -> None:
    bus = make_bus()
    alive = [True]

    class Mark:
        def __del__(self) -> None:
            alive[0] = False

    async def read(subscription: tickbus.AsyncEventSubscription[Any], _mark: Mark) -> None:
        await subscription.recv()

    async def main() -> None:
        with tickbus.EventBus[str](bus.backend) as own:
            task = asyncio.create_task(read(own.subscribe_async(), Mark()))
            await spin()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            del task
            with pytest.warns(ResourceWarning):
                gc.collect()

    asyncio.run(main())
    assert not alive[0]


if sys.version_info < (3, 14):

    def test_a_woken_task_may_run_the_loop_itself(make_bus: MakeBus) -> None:
        # As nest_asyncio does: no task is current while a task runs the loop.
        bus = make_bus()
        outer, inner = bus.subscribe_async("outer"), bus.subscribe_async("inner")
        received = []

        async def read_inner() -> None:
            received.extend([await inner.recv() for _ in range(4)])

        async def read_outer() -> None:
            loop: Any = asyncio.get_running_loop()
            tasks = asyncio.tasks._current_tasks  # type: ignore[attr-defined]
            for _ in range(4):
                event = await outer.recv()
                bus.publish(f"inside {event}", "inner")
                current = tasks.pop(loop)
                for _ in range(3):
                    loop._run_once()
                tasks[loop] = current
                assert inner.pending == 0
                await spin()

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(read_outer())
                group.create_task(read_inner())
                await spin()
                for event in range(4):
                    bus.publish(event, "outer")
                    await spin(20)

        asyncio.run(main())
        assert received == [f"inside {event}" for event in range(4)]


_LOOPS_THAT_CLOSE = """
import asyncio, threading
import tickbus

with tickbus.EventBus("BACKEND", 16, tickbus.BackpressureConfig(drop_oldest=True)) as bus:
    subscriptions = [bus.subscribe_async(on_lag="count") for _ in range(4)]
    ended = threading.Event()

    def produce():
        while not ended.is_set():
            bus.publish("event")

    async def main():
        for _ in range(20):
            await asyncio.gather(*(subscription.recv() for subscription in subscriptions))

    threads = [threading.Thread(target=produce) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        task = loop.create_task(subscriptions[0].recv())
        loop.close()
        task._log_destroy_pending = False
        del task
    ended.set()
    for thread in threads:
        thread.join()
    for subscription in subscriptions:
        subscription.close()
print("done")
"""


@pytest.mark.parametrize("eventfd", ["1", "0"])
def test_loops_that_close_while_threads_publish_give_no_traceback(
    backend: str, eventfd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TICKBUS_EVENTFD", eventfd)
    child = run_child(_LOOPS_THAT_CLOSE.replace("BACKEND", backend))
    assert (child.returncode, child.stdout, child.stderr) == (0, "done\n", "")


@lock_free
def test_a_busy_polled_loop_receives_everything_without_sleeping(make_bus: MakeBus) -> None:
    bus = make_bus(64, max_block_duration=60.0)
    subscription = bus.subscribe_async()
    poll = tickbus.BusyPoll(0.01, adaptive=False)
    number = 50

    async def main() -> list[object]:
        received = []
        turn = threading.Semaphore(0)

        def produce() -> None:
            for event in range(number):
                turn.acquire()
                bus.publish(event)

        async with poll:
            thread = threading.Thread(target=produce)
            thread.start()
            for _ in range(number):
                turn.release()
                received.append(await subscription.recv())
            thread.join()
        return received

    assert asyncio.run(main()) == list(range(number))
    assert poll.hits > 0
    assert poll.spins >= poll.hits


@lock_free
def test_what_a_woken_task_schedules_goes_before_the_next_spin(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    poll = tickbus.BusyPoll(0.01, adaptive=False)

    async def main() -> int:
        async with poll:
            thread = threading.Thread(target=bus.publish, args=("event",))
            # Not before this task sleeps.
            asyncio.get_running_loop().call_soon(thread.start)
            await subscription.recv()
            spins = poll.spins
            await asyncio.sleep(0)
            thread.join()
            return poll.spins - spins

    assert asyncio.run(main()) == 0


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs 2 CPUs"
)
def test_a_loop_whose_thread_is_bound_to_one_cpu_can_be_busy_polled() -> None:
    poll = tickbus.BusyPoll()

    async def main() -> None:
        async with poll:
            await spin()

    def run() -> None:
        # Of this thread alone.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        asyncio.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert poll.spins > 0


@lock_free
def test_adaptive_busy_polling_rests_where_nothing_comes(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    poll = tickbus.BusyPoll(0.00001)

    async def main() -> None:
        async with poll:
            await spin(100)
            assert (poll.spins, poll.hits) == (64, 0)
            task = asyncio.create_task(subscription.recv())
            await spin()
            thread = threading.Thread(target=bus.publish, args=("event",))
            thread.start()
            assert await task == "event"
            thread.join()

    asyncio.run(main())


def test_busy_polling_ends_with_its_block() -> None:
    poll = tickbus.BusyPoll(0.00001, adaptive=False)

    async def main() -> None:
        async with poll:
            await spin()
        spins = poll.spins
        await spin()
        assert poll.spins == spins > 0
        async with poll:
            await spin()
        assert poll.spins > 0

    asyncio.run(main())


def test_a_loop_is_busy_polled_once_at_a_time() -> None:
    async def main() -> None:
        async with tickbus.BusyPoll():
            with pytest.raises(RuntimeError, match="busy-polled already"):
                await tickbus.BusyPoll().__aenter__()
        async with tickbus.BusyPoll():
            pass

    asyncio.run(main())


def test_busy_polling_needs_a_loop_that_is_woken_through_an_eventfd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        with pytest.raises(tickbus.ConfigError, match="eventfd"):
            await tickbus.BusyPoll().__aenter__()

    with contextlib.closing(LoopWithoutReaders()) as loop:
        loop.run_until_complete(main())
    monkeypatch.setenv("TICKBUS_EVENTFD", "0")
    asyncio.run(main())


@pytest.mark.parametrize("max_spin", [0.0, -1.0, 0.02, float("nan"), float("inf")])
def test_a_spin_that_is_no_short_time_is_refused(max_spin: float) -> None:
    with pytest.raises(tickbus.ConfigError, match="max_spin was"):
        tickbus.BusyPoll(max_spin)
