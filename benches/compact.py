"""Cases of compact events: `EventSystem` against `asyncio.PriorityQueue`, arrays, and Rust threads.

As in `cases.py`, a case returns seconds per event and raises `AssertionError` when an event was
lost, doubled or out of place.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from statistics import median
from time import perf_counter, time_ns
from typing import Any

import numpy as np
from cases import FILL, IDLE_GAP_SECONDS

from tickbus import EVENT_DTYPE, AsyncSystemSubscription, Event, EventSystem, EventType, _core

#: Events of an array.
ARRAY = 256


def make_events(count: int) -> list[Event]:
    """Returns events that are all different, of one lane."""
    return [Event(0, EventType.PriceUpdate, metadata=number) for number in range(count)]


def make_array(first: int) -> np.ndarray[Any, Any]:
    """Returns an array of events that are all different, of one lane."""
    events = np.zeros(ARRAY, EVENT_DTYPE)
    events["event_type"] = EventType.PriceUpdate
    events["metadata"] = np.arange(first, first + ARRAY)
    return events


def publish_system(count: int, subscribers: int = 1) -> float:
    """Times `EventSystem.publish` of events made beforehand."""
    with EventSystem() as system, ExitStack() as stack:
        subscriptions = [stack.enter_context(system.subscribe()) for _ in range(subscribers)]
        takes = [subscription.try_recv for subscription in subscriptions]
        return _publishing(system.publish, takes, make_events, count)


def publish_priority_queue(count: int) -> float:
    """Times `put_nowait` of the same events in tuples that order them, made beforehand."""
    queue: asyncio.PriorityQueue[tuple[int, int, Event]] = asyncio.PriorityQueue()
    seconds = _publishing(queue.put_nowait, [queue.get_nowait], _prioritized, count)
    assert queue.empty()
    return seconds


def _prioritized(count: int) -> list[tuple[int, int, Event]]:
    return [(0, number, event) for number, event in enumerate(make_events(count))]


def _publishing(
    publish: Callable[[Any], object],
    takes: list[Callable[[], Any]],
    make: Callable[[int], list[Any]],
    count: int,
) -> float:
    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make(FILL)
        start = perf_counter()
        for event in events:
            publish(event)
        spent = perf_counter() - start
        # The first fill makes the memory warm.
        seconds += spent if number > 0 else 0.0
        for take in takes:
            assert [take() for _ in events] == events
    return seconds / count


def ready_system(count: int) -> float:
    """Times `await recv()` of events that are there."""

    async def case() -> float:
        with EventSystem() as system:
            async with system.subscribe_async() as subscription:
                return await _ready(system.publish, subscription.recv, make_events, count)

    return asyncio.run(case())


def ready_priority_queue(count: int) -> float:
    """Times `await get()` of events that are there."""

    async def case() -> float:
        queue: asyncio.PriorityQueue[tuple[int, int, Event]] = asyncio.PriorityQueue()
        return await _ready(queue.put_nowait, queue.get, _prioritized, count)

    return asyncio.run(case())


async def _ready(
    publish: Callable[[Any], object],
    recv: Callable[[], Awaitable[Any]],
    make: Callable[[int], list[Any]],
    count: int,
) -> float:
    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make(FILL)
        for event in events:
            publish(event)
        start = perf_counter()
        received = [await recv() for _ in repeat(None, FILL)]
        spent = perf_counter() - start
        seconds += spent if number > 0 else 0.0
        assert received == events
    return seconds / count


def publish_array(count: int) -> float:
    """Times `publish_batch` of an array of 256 events, for each event."""
    return _arrays(count, lambda subscription, _array: subscription.recv_array(ARRAY))[0]


def recv_array(count: int) -> float:
    """Times `recv_array` of 256 events that are there, for each event."""
    return _arrays(count, lambda subscription, _array: subscription.recv_array(ARRAY))[1]


def recv_into(count: int) -> float:
    """Times `recv_into` of 256 events that are there, for each event."""

    def take(subscription: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        taken = subscription.recv_into(array)
        return array if taken == len(array) else array[:taken]

    return _arrays(count, take)[1]


def _arrays(
    count: int, take: Callable[[Any, np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> tuple[float, float]:
    """Returns the seconds for each event of publishing arrays, and of taking them."""
    publishing = taking = 0.0
    target = np.zeros(ARRAY, EVENT_DTYPE)
    with EventSystem() as system, system.subscribe() as subscription:
        for number in range(-8, count // ARRAY):
            events = make_array(max(number, 0) * ARRAY)
            start = perf_counter()
            published = system.publish_batch(events)
            middle = perf_counter()
            taken = take(subscription, target)
            end = perf_counter()
            assert published == ARRAY
            assert taken.tobytes() == events.tobytes()
            if number >= 0:
                publishing += middle - start
                taking += end - middle
        assert subscription.pending == 0
    each = count // ARRAY * ARRAY
    return publishing / each, taking / each


Wait = Callable[[], Awaitable[Any]]
#: Makes what a thread calls after each event, and what a task awaits before it takes events.
Waking = Callable[[AsyncSystemSubscription], tuple[Callable[[], object] | None, Wait]]


def by_tickbus(subscription: AsyncSystemSubscription) -> tuple[None, Wait]:
    """Returns nothing to call, and the subscription's own `recv_array`."""
    return None, lambda: subscription.recv_array(ARRAY)


def by_call_soon(subscription: AsyncSystemSubscription) -> tuple[Callable[[], object], Wait]:
    """Returns `call_soon_threadsafe`, by which the loop sets the result of a future."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] | None = None

    def wake() -> None:
        if future is not None and not future.done():
            future.set_result(None)

    async def wait() -> Any:
        nonlocal future
        while subscription.pending == 0:
            future = loop.create_future()
            await future
        # What is there is taken without a suspension.
        return await subscription.recv_array(ARRAY)

    return partial(loop.call_soon_threadsafe, wake), wait


def native_latency(waking: Waking, count: int) -> float:
    """Returns the median time from a Rust thread's publish to a task of an idle loop that slept and
    has the events in an array, in seconds."""

    async def case() -> float:
        latencies: list[int] = []
        received: list[int] = []
        with EventSystem() as system:
            async with system.subscribe_async() as subscription:
                call, wait = waking(subscription)
                feed = _core._NativeFeed(system, make_events(count), IDLE_GAP_SECONDS, call)
                while len(received) < count:
                    events = await wait()
                    now = time_ns()
                    latencies += (now - events["timestamp"].astype(np.int64)).tolist()
                    received += events["metadata"].tolist()
                assert feed.published == count
        assert received == list(range(count))
        return median(latencies) / 1e9

    return asyncio.run(case())


def signals_of_a_publish(subscribers: int, count: int) -> float:
    """Returns how often a Rust thread signals a loop for an event that so many tasks sleep for."""
    signals = 0

    class CountingLoop(asyncio.SelectorEventLoop):
        def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
            def count_and_call() -> None:
                nonlocal signals
                if "LoopBridge" in type(callback).__name__:
                    # An eventfd counts what was written to it.
                    signals += int.from_bytes(os.read(fd, 8), sys.byteorder)
                callback(*args)

            super().add_reader(fd, count_and_call)

    async def case() -> float:
        nonlocal signals
        with EventSystem() as system:
            readers = [system.subscribe_async() for _ in range(subscribers)]
            for event in make_events(count):
                tasks = [asyncio.create_task(reader.recv()) for reader in readers]
                await asyncio.sleep(0)
                _core._NativeFeed(system, [event])
                assert await asyncio.gather(*tasks) == [event] * subscribers
            for reader in readers:
                reader.close()
        return signals / count

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        return runner.run(case())
