"""What is measured: each case times one thing and checks count and content of what was received.

A case returns seconds per event and raises `AssertionError` when an event was lost, doubled or
out of place. The peers do the same work in the same loops.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import repeat
from statistics import median
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

import aiologic

import tickbus

BATCH = 64
#: Events published before they are read, where reading is not timed or timed alone.
FILL = 1_024
IDLE_GAP_SECONDS = 0.0003
_TOPIC = "trades.BTCUSDT"

Get = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Fanout:
    """One way from a publisher to `k` readers.

    Attributes:
        publish: Gives one event to every reader, from the thread that the way is made for.
        readers: One call for each reader that gives an awaitable for its next event.
        batches: As `readers`, for lists of events; empty where there is no such call.
        close: Ends the way once everything was read.
    """

    publish: Callable[[Any], object]
    readers: list[Get]
    batches: list[Callable[[int], Awaitable[list[Any]]]]
    close: Callable[[], None] = lambda: None


def tickbus_fanout(subscribers: int, capacity: int = 16_384) -> Fanout:
    """Returns a way over a `lock_free` bus whose subscriptions lose nothing."""
    patience = tickbus.BackpressureConfig(max_block_duration=60.0)
    bus: tickbus.EventBus[Any] = tickbus.LockFreeEventBus(capacity, patience)
    subscriptions = [bus.subscribe_async() for _ in range(subscribers)]

    def close() -> None:
        for subscription in subscriptions:
            subscription.close()

    return Fanout(
        bus.publish,
        [subscription.recv for subscription in subscriptions],
        [subscription.recv_many for subscription in subscriptions],
        close,
    )


def queue_fanout(subscribers: int) -> Fanout:
    """Returns a way over an `asyncio.Queue` for each reader, used on the loop's own thread."""
    queues: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(subscribers)]
    return Fanout(_to_each([q.put_nowait for q in queues]), [q.get for q in queues], [])


def threaded_queue_fanout(subscribers: int) -> Fanout:
    """Returns the same, used from another thread: one `call_soon_threadsafe` for each event."""
    call_soon = asyncio.get_running_loop().call_soon_threadsafe
    local = queue_fanout(subscribers)
    put = local.publish
    return Fanout(lambda event: call_soon(put, event), local.readers, [])


def aiologic_fanout(subscribers: int) -> Fanout:
    """Returns a way over an aiologic `SimpleQueue` for each reader."""
    queues: list[aiologic.SimpleQueue[Any]] = [aiologic.SimpleQueue() for _ in range(subscribers)]
    return Fanout(_to_each([q.put for q in queues]), [q.async_get for q in queues], [])


def _to_each(puts: list[Callable[[Any], object]]) -> Callable[[Any], object]:
    if len(puts) == 1:
        return puts[0]

    def publish(event: Any) -> None:
        for put in puts:
            put(event)

    return publish


def make_events(count: int) -> list[tuple[str, int]]:
    """Returns events that are all different, made before anything is timed."""
    return [("BTCUSDT", number) for number in range(count)]


def empty_loop(count: int) -> float:
    """Times the loop of the publishing cases around nothing."""
    events = make_events(count)
    start = perf_counter()
    for _event in events:
        pass
    return (perf_counter() - start) / count


def publish_tickbus(subscribers: int, count: int, topic: str | None = None) -> float:
    """Times `publish` when nobody waits; with `topic` on a `Topic`, wanted by every pattern."""
    bus: tickbus.EventBus[Any] = tickbus.LockFreeEventBus(FILL)
    pattern = None if topic is None else "trades.*"
    subscriptions = [bus.subscribe(pattern) for _ in range(subscribers)]
    publish = bus.publish
    known = bus.topic(topic or _TOPIC)

    def plain(events: list[Any]) -> None:
        for event in events:
            publish(event)

    def on_topic(events: list[Any]) -> None:
        for event in events:
            publish(event, known)

    seconds = _timed_fills(
        plain if topic is None else on_topic, [s.try_recv for s in subscriptions], count
    )
    assert all(subscription.try_recv() is None for subscription in subscriptions)
    metrics = bus.metrics()
    assert metrics.total_dropped == 0
    assert metrics.total_published == count + FILL
    for subscription in subscriptions:
        subscription.close()
    return seconds


def publish_tickbus_topic(subscribers: int, count: int) -> float:
    """Times `publish` on a `Topic`."""
    return publish_tickbus(subscribers, count, _TOPIC)


def publish_queues(subscribers: int, count: int) -> float:
    """Times `put_nowait` to a queue for each subscriber, without an inner loop for one."""
    queues: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(subscribers)]
    puts = [queue.put_nowait for queue in queues]
    first = puts[0]

    def to_one(events: list[Any]) -> None:
        for event in events:
            first(event)

    def to_each(events: list[Any]) -> None:
        for event in events:
            for put in puts:
                put(event)

    seconds = _timed_fills(
        to_one if subscribers == 1 else to_each, [q.get_nowait for q in queues], count
    )
    assert all(queue.empty() for queue in queues)
    return seconds


def _timed_fills(
    publish_all: Callable[[list[Any]], None], readers: list[Callable[[], Any]], count: int
) -> float:
    """Publishes `FILL` events at a time, and reads and compares them outside of the time."""
    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make_events(FILL)
        start = perf_counter()
        publish_all(events)
        spent = perf_counter() - start
        # The first fill makes the memory warm.
        seconds += spent if number > 0 else 0.0
        for read in readers:
            assert [read() for _ in events] == events
    return seconds / count


def ready_recv(count: int) -> float:
    """Times `await recv()` of events that are there."""
    return asyncio.run(_ready(tickbus_fanout(1, FILL), count))


def ready_recv_many(count: int) -> float:
    """Times `await recv_many(64)` of events that are there, for each event."""
    return asyncio.run(_ready_many(tickbus_fanout(1, FILL), count))


def ready_queue_get(count: int) -> float:
    """Times `await asyncio.Queue.get()` of events that are there."""

    async def case() -> float:
        return await _ready(queue_fanout(1), count)

    return asyncio.run(case())


async def _ready(fanout: Fanout, count: int) -> float:
    (recv,) = fanout.readers
    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make_events(FILL)
        for event in events:
            fanout.publish(event)
        start = perf_counter()
        received = [await recv() for _ in repeat(None, FILL)]
        spent = perf_counter() - start
        seconds += spent if number > 0 else 0.0
        assert received == events
        # Freed here, outside of the time.
        del received
    fanout.close()
    return seconds / count


async def _ready_many(fanout: Fanout, count: int) -> float:
    (recv_many,) = fanout.batches
    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make_events(FILL)
        for event in events:
            fanout.publish(event)
        start = perf_counter()
        batches = [await recv_many(BATCH) for _ in range(FILL // BATCH)]
        spent = perf_counter() - start
        seconds += spent if number > 0 else 0.0
        assert [event for batch in batches for event in batch] == events
        del batches
    fanout.close()
    return seconds / count


def thread_to_asyncio(
    make: Callable[[int], Fanout], subscribers: int, count: int, batch: int | None = None
) -> float:
    """Times a thread that publishes flat out until every task has everything.

    Args:
        make: Makes the way.
        subscribers: Tasks, each with all events.
        count: Events published.
        batch: Takes lists of up to so many events; `None` takes one at a time.

    Returns:
        Seconds for each published event.
    """

    async def case() -> float:
        fanout = make(subscribers)
        events = make_events(count)

        async def read(recv: Get) -> list[Any]:
            return [await recv() for _ in repeat(None, count)]

        async def read_many(recv_many: Callable[[int], Awaitable[list[Any]]]) -> list[Any]:
            received: list[Any] = []
            while len(received) < count:
                received += await recv_many(batch or 1)
            return received

        def produce() -> None:
            publish = fanout.publish
            for event in events:
                publish(event)

        if batch is None:
            tasks = [asyncio.create_task(read(recv)) for recv in fanout.readers]
        else:
            tasks = [asyncio.create_task(read_many(recv)) for recv in fanout.batches]
        await asyncio.sleep(0)
        thread = threading.Thread(target=produce)
        start = perf_counter()
        thread.start()
        results = await asyncio.gather(*tasks)
        seconds = perf_counter() - start
        thread.join()
        assert all(received == events for received in results)
        fanout.close()
        return seconds / count

    return asyncio.run(case())


def idle_latency(make: Callable[[int], Fanout], count: int) -> float:
    """Returns the median time from a thread's `publish` to a task that slept, in seconds."""

    async def case() -> float:
        fanout = make(1)
        (recv,) = fanout.readers
        sent: list[int] = []

        def produce() -> None:
            for _ in range(count):
                sleep(IDLE_GAP_SECONDS)
                stamp = perf_counter_ns()
                sent.append(stamp)
                fanout.publish(stamp)

        thread = threading.Thread(target=produce)
        thread.start()
        received = []
        latencies = []
        for _ in range(count):
            stamp = await recv()
            latencies.append(perf_counter_ns() - stamp)
            received.append(stamp)
        thread.join()
        assert received == sent
        fanout.close()
        return median(latencies) / 1e9

    return asyncio.run(case())
