"""The queue: many producers, many consumers, threads and tasks, each event to exactly one."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import queue as stdlib
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tickbus
from support import PATIENCE_WITHOUT_END, cancel, run, run_child, spin
from tickbus import Closed, Full, LockFreeEventQueue, PublishTimeout, ReceiveTimeout


def filled(capacity: int) -> LockFreeEventQueue[Any]:
    queue = LockFreeEventQueue[Any](capacity)
    for number in range(capacity):
        queue.enqueue(number)
    return queue


def drained(queue: LockFreeEventQueue[Any]) -> list[Any]:
    return list(iter(queue.try_dequeue, None))


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does; the timeout of the test ends it."""
    while not condition():
        time.sleep(0)


def test_events_leave_in_the_order_in_which_they_came() -> None:
    queue = LockFreeEventQueue[str](3)
    assert (queue.size, queue.capacity, queue.is_empty, queue.closed) == (0, 4, True, False)
    assert queue.try_dequeue() is None
    for event in "abcd":
        queue.enqueue(event)
    assert (queue.size, queue.is_empty) == (4, False)
    assert repr(queue) == "<LockFreeEventQueue size=4/4>"
    assert [queue.dequeue(), queue.try_dequeue(), queue.dequeue_timeout(1.0)] == ["a", "b", "c"]
    assert asyncio.run(_await(queue.dequeue_async)) == "d"
    assert queue.is_empty


async def _await(call: Callable[..., Any], *arguments: Any) -> Any:
    return await call(*arguments)


def test_the_queue_holds_the_object_itself_and_no_copy() -> None:
    queue, event = LockFreeEventQueue[Any](1), object()
    queue.enqueue(event)
    assert queue.dequeue() is event


def test_a_full_queue_says_so_and_nobody_has_the_event() -> None:
    queue = filled(2)
    with pytest.raises(Full, match=r"the queue holds 2 events, and no more; nobody has the event"):
        queue.enqueue(2)
    with pytest.raises(stdlib.Full):
        queue.enqueue(2)
    with pytest.raises(PublishTimeout, match="the queue held 2 events until the timeout"):
        queue.enqueue_timeout(2, 0.0)
    assert drained(queue) == [0, 1]


def test_nothing_in_time_is_a_timeout_and_the_queue_is_unchanged() -> None:
    queue = LockFreeEventQueue[int](2)
    with pytest.raises(ReceiveTimeout, match=r"no event came within 0.0 s; the queue is"):
        queue.dequeue_timeout(0.0)
    queue.enqueue(1)
    assert queue.dequeue_timeout(0.0) == 1


@pytest.mark.parametrize("capacity", [0, -1, 2**31, "many"])
def test_a_capacity_that_cannot_be_is_refused(capacity: Any) -> None:
    with pytest.raises(tickbus.ConfigError, match="capacity was"):
        LockFreeEventQueue(capacity)


def test_none_is_no_event() -> None:
    queue = LockFreeEventQueue[Any](2)
    calls: list[Callable[..., Any]] = [queue.enqueue, queue.enqueue_async]
    for enqueue in (*calls, lambda event: queue.enqueue_timeout(event, 1.0)):
        with pytest.raises(TypeError, match="event was None"):
            enqueue(None)
    assert queue.is_empty


def test_a_closed_queue_gives_what_it_has_and_takes_nothing() -> None:
    queue = filled(2)
    queue.close()
    queue.close()
    assert queue.closed
    assert repr(queue) == "<LockFreeEventQueue size=2/2 closed>"
    for enqueue in (
        lambda: queue.enqueue(9),
        lambda: queue.enqueue_timeout(9, PATIENCE_WITHOUT_END),
        lambda: asyncio.run(_await(queue.enqueue_async, 9)),
    ):
        with pytest.raises(Closed, match=r"the queue is closed; events can be enqueued only befor"):
            enqueue()
    assert [queue.dequeue(), queue.try_dequeue()] == [0, 1]
    for dequeue in (
        queue.dequeue,
        queue.try_dequeue,
        lambda: queue.dequeue_timeout(PATIENCE_WITHOUT_END),
        lambda: asyncio.run(_await(queue.dequeue_async)),
    ):
        with pytest.raises(Closed, match="the queue is closed and everything was dequeued"):
            dequeue()


def test_closing_frees_everybody_who_waits() -> None:
    full, empty = filled(1), LockFreeEventQueue[int](1)
    ended: list[Any] = []

    def end(call: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(Closed):
            call(*arguments)
        ended.append(call)

    waits: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (full.enqueue_timeout, (1, PATIENCE_WITHOUT_END)),
        (empty.dequeue, ()),
        (empty.dequeue_timeout, (PATIENCE_WITHOUT_END,)),
    ]
    threads = [threading.Thread(target=end, args=(call, *rest)) for call, rest in waits]

    async def main() -> None:
        tasks = [
            asyncio.ensure_future(empty.dequeue_async()),
            asyncio.ensure_future(full.enqueue_async(1)),
        ]
        await spin()
        full.close()
        empty.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Closed, Closed]

    for thread in threads:
        thread.start()
    asyncio.run(main())
    for thread in threads:
        thread.join()
    assert len(ended) == 3
    assert drained_to_the_end(full) == [0]


def drained_to_the_end(queue: LockFreeEventQueue[Any]) -> list[Any]:
    received = []
    while True:
        try:
            received.append(queue.dequeue())
        except Closed:
            return received


def test_what_would_block_a_running_loop_is_refused() -> None:
    async def main() -> None:
        queue = LockFreeEventQueue[int](1)
        for call, instead in (
            (queue.dequeue, "dequeue_async"),
            (lambda: queue.dequeue_timeout(1.0), "dequeue_async"),
            (lambda: queue.enqueue_timeout(1, 1.0), "enqueue_async"),
        ):
            with pytest.raises(RuntimeError, match=rf"would block .* use {instead}\(\)"):
                call()
        queue.enqueue(1)
        with pytest.raises(Full):
            queue.enqueue(2)
        assert queue.try_dequeue() == 1

    asyncio.run(main())


def test_a_producer_that_waits_is_not_overtaken() -> None:
    async def main() -> None:
        queue = filled(1)
        waiting = [asyncio.ensure_future(queue.enqueue_async(number)) for number in (1, 2)]
        await spin()
        received = [queue.try_dequeue()]
        with pytest.raises(Full):
            queue.enqueue("newcomer")
        received += [await queue.dequeue_async() for _ in waiting]
        assert received == [0, 1, 2]
        assert await asyncio.gather(*waiting) == [None, None]

    asyncio.run(main())


def test_tasks_of_any_loop_are_served_in_the_order_in_which_they_came(any_loop: str) -> None:
    async def main() -> None:
        queue = LockFreeEventQueue[int](16)
        order: list[tuple[int, int]] = []

        async def consume(place: int) -> None:
            order.append((place, await queue.dequeue_async()))

        async with asyncio.TaskGroup() as group:
            for place in range(5):
                group.create_task(consume(place))
                await asyncio.sleep(0)
            for number in range(3):
                queue.enqueue(number)
            await asyncio.to_thread(lambda: [queue.enqueue(number) for number in (3, 4)])
        assert order == [(number, number) for number in range(5)]

    run(main)


def test_threads_and_tasks_stand_in_one_line(any_loop: str) -> None:
    async def main() -> None:
        queue = LockFreeEventQueue[int](4)
        received: dict[str, int] = {}

        def consume(name: str) -> None:
            received[name] = queue.dequeue()

        tasks = [asyncio.ensure_future(queue.dequeue_async()) for _ in range(2)]
        threads = [threading.Thread(target=consume, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        await spin()
        for number in range(4):
            queue.enqueue(number)
        results = await asyncio.gather(*tasks)
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert sorted([*results, *received.values()]) == [0, 1, 2, 3]
        assert queue.is_empty

    run(main)


def test_two_loops_and_threads_share_a_queue_and_each_event_reaches_one_consumer() -> None:
    queue = LockFreeEventQueue[tuple[int, int]](8)
    received: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    events = 1_000

    def consume(place: int) -> None:
        while True:
            try:
                received[place].append(queue.dequeue())
            except Closed:
                return

    async def consume_in_tasks(place: int) -> None:
        async def one() -> None:
            while True:
                try:
                    received[place].append(await queue.dequeue_async())
                except Closed:
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(one())

    def produce(producer: int) -> None:
        for number in range(events):
            queue.enqueue_timeout((producer, number), PATIENCE_WITHOUT_END)

    async def produce_in_tasks(producer: int) -> None:
        for number in range(events):
            await queue.enqueue_async((producer, number))

    consumers = [
        threading.Thread(target=consume, args=(0,)),
        threading.Thread(target=consume, args=(1,)),
        threading.Thread(target=lambda: asyncio.run(consume_in_tasks(2))),
        threading.Thread(target=lambda: asyncio.run(consume_in_tasks(3))),
    ]
    producers = [
        threading.Thread(target=produce, args=(0,)),
        threading.Thread(target=produce, args=(1,)),
        threading.Thread(target=lambda: asyncio.run(produce_in_tasks(2))),
    ]
    for thread in (*consumers, *producers):
        thread.start()
    for thread in producers:
        thread.join()
    queue.close()
    for thread in consumers:
        thread.join()
    everything = [event for each in received for event in each]
    assert sorted(everything) == [(who, number) for who in range(3) for number in range(events)]
    for thread_received in received[:2]:
        for producer in range(3):
            numbers = [number for who, number in thread_received if who == producer]
            assert numbers == sorted(numbers)


@pytest.mark.parametrize("seed", range(8))
def test_cancelling_five_competing_consumers_at_random_loses_and_doubles_nothing(
    any_loop: str, seed: int
) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        queue = LockFreeEventQueue[int](4)
        received: list[int] = []
        waiting: list[asyncio.Task[int]] = []
        refused = enqueued = 0

        def settle() -> None:
            for task in [task for task in waiting if task.done()]:
                waiting.remove(task)
                if not task.cancelled():
                    received.append(task.result())

        for _ in range(600):
            while len(waiting) < 5:
                waiting.append(asyncio.create_task(_await(queue.dequeue_async)))
            match draw.randrange(4):
                case 0 | 1:
                    try:
                        queue.enqueue(enqueued)
                        enqueued += 1
                    except Full:
                        refused += 1
                case 2:
                    draw.choice(waiting).cancel()
                case 3:
                    await asyncio.sleep(0)
            settle()
        await spin(20)
        settle()
        received += [task.result() for task in waiting if not await cancel(task)]
        received += drained(queue)
        assert sorted(received) == list(range(enqueued))
        assert refused > 0
        assert enqueued > 100

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_producers_at_random_loses_and_doubles_nothing(seed: int) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        queue = LockFreeEventQueue[int](2)
        received: list[int] = []
        published: list[int] = []
        waiting: dict[asyncio.Task[None], int] = {}
        number = 0

        async def settle() -> None:
            await asyncio.sleep(0)
            for task in [task for task in waiting if task.done()]:
                event = waiting.pop(task)
                if not task.cancelled():
                    published.append(event)

        for _ in range(400):
            while len(waiting) < 5:
                waiting[asyncio.create_task(_await(queue.enqueue_async, number))] = number
                number += 1
            match draw.randrange(3):
                case 0:
                    event = queue.try_dequeue()
                    received += [] if event is None else [event]
                case 1:
                    draw.choice(list(waiting)).cancel()
                case 2:
                    await settle()
        for task in list(waiting):
            await cancel(task)
        await settle()
        received += drained(queue)
        assert sorted(received) == sorted(published)
        assert len(published) > 50

    run(main)


def test_a_cancelled_consumer_passes_its_turn_on() -> None:
    async def main() -> None:
        queue = LockFreeEventQueue[str](4)
        first, second = [asyncio.ensure_future(queue.dequeue_async()) for _ in range(2)]
        await spin()
        queue.enqueue("a")
        first.cancel()
        assert await second == "a"
        assert first.cancelled()

    asyncio.run(main())


def test_a_timeout_and_a_wait_cancel_what_they_wait_for() -> None:
    async def main() -> None:
        queue = LockFreeEventQueue[str](1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await queue.dequeue_async()
        queue.enqueue("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.enqueue_async("b"), 0.01)
        assert drained(queue) == ["a"]
        awaitable = queue.dequeue_async()
        queue.enqueue("c")
        assert await awaitable == "c"
        with pytest.raises(RuntimeError, match=r"cannot await dequeue_async\(\) twice"):
            await awaitable

    asyncio.run(main())


def test_a_consumer_whose_loop_has_ended_takes_no_turn() -> None:
    queue = LockFreeEventQueue[str](4)
    gone = asyncio.new_event_loop()
    forgotten = gone.create_task(_await(queue.dequeue_async))
    gone.run_until_complete(asyncio.sleep(0))

    async def main() -> None:
        waiting = asyncio.create_task(_await(queue.dequeue_async))
        await spin()
        gone.close()
        await asyncio.to_thread(queue.enqueue, "a")
        assert await waiting == "a"

    asyncio.run(main())
    assert not forgotten.done()
    # Its loop is closed: the task can only be dropped, and says so.
    forgotten._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_consumer_that_finds_events_gives_the_loop_a_turn_now_and_then() -> None:
    async def main() -> None:
        queue = filled(1_024)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        for _ in range(1_024):
            await queue.dequeue_async()
        assert turns >= 3
        counting.cancel()

    asyncio.run(main())


@given(st.lists(st.sampled_from(["enqueue", "dequeue"]), max_size=60), st.sampled_from([1, 2, 8]))
def test_it_is_a_bounded_queue(steps: list[str], capacity: int) -> None:
    queue, model = LockFreeEventQueue[int](capacity), deque[int]()
    for number, step in enumerate(steps):
        if step == "dequeue":
            assert queue.try_dequeue() == (model.popleft() if model else None)
        elif len(model) < capacity:
            queue.enqueue(number)
            model.append(number)
        else:
            with pytest.raises(Full):
                queue.enqueue(number)
        assert (queue.size, queue.is_empty) == (len(model), not model)
    assert drained(queue) == list(model)


class Event:
    """Can be referred to weakly."""


def test_a_cycle_from_an_event_back_to_its_queue_is_collected() -> None:
    queue, event = LockFreeEventQueue[Any](4), Event()
    vars(event)["queue"] = queue
    queue.enqueue(event)
    gone = weakref.ref(event), weakref.ref(queue)
    del queue, event
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_events_live_until_they_are_dequeued_and_no_longer() -> None:
    queue, event = LockFreeEventQueue[Any](4), Event()
    gone = weakref.ref(event)
    queue.enqueue(event)
    del event
    gc.collect()
    assert gone() is not None
    queue.dequeue()
    assert gone() is None
    queue.enqueue(Event())
    gone = weakref.ref(queue.dequeue())
    assert gone() is None


def test_a_dropped_queue_drops_its_events_without_a_warning() -> None:
    event = Event()
    queue = LockFreeEventQueue[Any](4)
    queue.enqueue(event)
    gone = weakref.ref(event)
    del event, queue
    assert gone() is None


def test_a_queue_refuses_to_be_pickled_and_copied() -> None:
    queue = LockFreeEventQueue[int](4)
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle LockFreeEventQueue: it belongs to one"):
            refused(queue)


def test_after_fork_the_child_is_refused_and_the_parent_goes_on() -> None:
    result = run_child("""
        import asyncio, os, warnings
        import tickbus
        from tickbus import ForkedError

        queue = tickbus.LockFreeEventQueue(4)
        queue.enqueue("before")

        async def wait(call, *arguments):
            return await call(*arguments)

        made_before = queue.dequeue_async(), queue.enqueue_async("made before")

        async def first():
            return await made_before[0]

        async def second():
            return await made_before[1]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            calls = [
                lambda: queue.enqueue(1), lambda: queue.enqueue_timeout(1, 1.0), queue.dequeue,
                queue.try_dequeue, lambda: queue.dequeue_timeout(1.0), queue.close,
                lambda: asyncio.run(wait(queue.enqueue_async, 1)),
                lambda: asyncio.run(wait(queue.dequeue_async)),
                lambda: asyncio.run(first()), lambda: asyncio.run(second()),
            ]
            for number, call in enumerate(calls):
                try:
                    call()
                except ForkedError as error:
                    assert "a new one here" in str(error)
                else:
                    os._exit(100 + number)
            mine = tickbus.LockFreeEventQueue(4)
            mine.enqueue("mine")
            os._exit(mine.dequeue() != "mine")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        print(queue.dequeue(), asyncio.run(second()), queue.try_dequeue())
    """)
    assert (result.stdout, result.stderr) == ("before None made before\n", "")


def test_the_interpreter_ends_quietly_while_threads_wait() -> None:
    result = run_child("""
        import threading, time
        import tickbus

        empty, full = tickbus.LockFreeEventQueue(1), tickbus.LockFreeEventQueue(1)
        full.enqueue(1)
        ended = []

        def wait(call, *arguments):
            try:
                call(*arguments)
            except tickbus.Closed:
                ended.append(call)

        for call in ((empty.dequeue,), (full.enqueue_timeout, 2, 3_600.0)):
            threading.Thread(target=wait, args=call, daemon=True).start()
        print("done")
    """)
    assert (result.stdout, result.stderr, result.returncode) == ("done\n", "", 0)
