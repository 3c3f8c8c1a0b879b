"""What is measured: each case times one thing and checks count and content of what was received.

A case returns seconds per event and raises `AssertionError` when an event was lost, doubled or
out of place. The peers of `fanouts.py` do the same work in the same loops.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from itertools import repeat
from queue import SimpleQueue
from statistics import median
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

import blinker
import pyee
import uvloop
from fanouts import Fanout, Get, Queue, fanout_of, tickbus_fanout

import tickbus

BATCH = 64
#: Events published before they are read, where reading is not timed or timed alone.
FILL = 1_024
#: The same for many subscribers: 64 queues of so many events take 256 KiB.
SMALL_FILL = 256
IDLE_GAP_SECONDS = 0.0003
_TOPIC = "trades.BTCUSDT"


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


def publish_tickbus(
    subscribers: int,
    count: int,
    topic: str | None = None,
    fill: int = FILL,
    latency_sampling: int | None = 128,
    backend: str = "lock_free",
    many: bool = False,
) -> float:
    """Times `publish` when nobody waits; with `topic` on a `Topic`, wanted by every pattern; with
    `many`, `publish_many` of whole fills."""
    bus: tickbus.EventBus[Any] = tickbus.EventBus(backend, fill, latency_sampling=latency_sampling)
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

    one_by_one = plain if topic is None else on_topic
    seconds = _timed_fills(
        bus.publish_many if many else one_by_one, [s.try_recv for s in subscriptions], count, fill
    )
    assert all(subscription.try_recv() is None for subscription in subscriptions)
    metrics = bus.metrics()
    assert metrics.total_dropped == 0
    assert metrics.total_published == count + fill
    for subscription in subscriptions:
        subscription.close()
    return seconds


def publish_tickbus_topic(subscribers: int, count: int) -> float:
    """Times `publish` on a `Topic`."""
    return publish_tickbus(subscribers, count, _TOPIC)


def publish_tickbus_each(subscribers: int, count: int) -> float:
    """Times `publish`, for each subscriber, while all queues fit into the cache of a core."""
    return publish_tickbus(subscribers, count, fill=SMALL_FILL) / subscribers


def publish_patterns(patterns: int, count: int) -> float:
    """Times `publish` on a `Topic` that the last of so many different patterns wants."""
    bus: tickbus.EventBus[Any] = tickbus.LockFreeEventBus(FILL)
    *others, wanting = [bus.subscribe(f"trades.S{number}.*") for number in range(patterns)]
    publish = bus.publish
    topic = bus.topic(f"trades.S{patterns - 1}.binance")

    def publish_all(events: list[Any]) -> None:
        for event in events:
            publish(event, topic)

    seconds = _timed_fills(publish_all, [wanting.try_recv], count)
    assert wanting.try_recv() is None
    assert all(other.try_recv() is None for other in others)
    for subscription in (*others, wanting):
        subscription.close()
    return seconds


def publish_queues(make: Callable[[], Queue], subscribers: int, count: int) -> float:
    """Times putting to a queue for each subscriber, without an inner loop for one."""
    queues = [make() for _ in range(subscribers)]
    puts = [queue.put for queue in queues]
    first = puts[0]

    def to_one(events: list[Any]) -> None:
        for event in events:
            first(event)

    def to_each(events: list[Any]) -> None:
        for event in events:
            for put in puts:
                put(event)

    seconds = _timed_fills(
        to_one if subscribers == 1 else to_each, [queue.take for queue in queues], count
    )
    for queue in queues:
        assert queue.pending() == 0
        queue.close()
    return seconds


Handler = Callable[[Any], object]


def handle_tickbus(handlers: int, count: int) -> float:
    """Times `publish`, and for each handler `try_recv` and the call, in one thread."""
    bus: tickbus.EventBus[Any] = tickbus.LockFreeEventBus(FILL)
    subscriptions = [bus.subscribe() for _ in range(handlers)]
    publish = bus.publish

    def prepare(functions: list[Handler]) -> Callable[[list[Any]], None]:
        pairs = [(s.try_recv, call) for s, call in zip(subscriptions, functions, strict=True)]

        def handle_all(events: list[Any]) -> None:
            for event in events:
                publish(event)
                for take, call in pairs:
                    call(take())

        return handle_all

    seconds = _timed_handlers(prepare, handlers, count)
    for subscription in subscriptions:
        subscription.close()
    return seconds


def handle_pyee(handlers: int, count: int) -> float:
    """Times `EventEmitter.emit`, which calls the handlers."""
    emitter = pyee.EventEmitter()

    def prepare(functions: list[Handler]) -> Callable[[list[Any]], None]:
        for function in functions:
            emitter.on("trade", function)
        emit = emitter.emit

        def handle_all(events: list[Any]) -> None:
            for event in events:
                emit("trade", event)

        return handle_all

    return _timed_handlers(prepare, handlers, count)


def handle_blinker(handlers: int, count: int) -> float:
    """Times `Signal.send`, which calls the handlers; strong references and no keywords."""
    signal = blinker.Signal()

    def prepare(functions: list[Handler]) -> Callable[[list[Any]], None]:
        for function in functions:
            signal.connect(function, weak=False)
        send = signal.send

        def handle_all(events: list[Any]) -> None:
            for event in events:
                send(event)

        return handle_all

    return _timed_handlers(prepare, handlers, count)


def _timed_handlers(
    prepare: Callable[[list[Handler]], Callable[[list[Any]], None]], handlers: int, count: int
) -> float:
    """Times handlers that append to a list each, which is compared outside of the time."""
    lists: list[list[Any]] = [[] for _ in range(handlers)]

    def handler_for(received: list[Any]) -> Handler:
        def handler(event: Any) -> None:
            received.append(event)

        return handler

    handle_all = prepare([handler_for(received) for received in lists])

    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make_events(FILL)
        start = perf_counter()
        handle_all(events)
        spent = perf_counter() - start
        seconds += spent if number > 0 else 0.0
        for received in lists:
            assert received == events
            received.clear()
    return seconds / count


def _timed_fills(
    publish_all: Callable[[list[Any]], None],
    readers: list[Callable[[], Any]],
    count: int,
    fill: int = FILL,
) -> float:
    """Publishes `fill` events at a time, and reads and compares them outside of the time."""
    seconds = 0.0
    for number in range(count // fill + 1):
        events = make_events(fill)
        start = perf_counter()
        publish_all(events)
        spent = perf_counter() - start
        # The first fill makes the memory warm.
        seconds += spent if number > 0 else 0.0
        for read in readers:
            assert [read() for _ in events] == events
    return seconds / count


def ready_recv(count: int, backend: str = "lock_free") -> float:
    """Times `await recv()` of events that are there."""
    return asyncio.run(_ready(tickbus_fanout(1, FILL, backend), count))


def ready_recv_many(count: int, backend: str = "lock_free") -> float:
    """Times `await recv_many(64)` of events that are there, for each event."""
    return asyncio.run(_ready_many(tickbus_fanout(1, FILL, backend), count))


def ready_queue(make: Callable[[], Queue], count: int) -> float:
    """Times a peer's awaiting of events that are there."""

    async def case() -> float:
        return await _ready(fanout_of(make, 1), count)

    return asyncio.run(case())


def put_and_take(make: Callable[[], Queue], count: int) -> float:
    """Times putting an event to an empty queue and taking it out again, in one thread."""
    queue = make()
    put, take = queue.put, queue.take
    seconds = 0.0
    for number in range(count // FILL + 1):
        events = make_events(FILL)
        received = []
        keep = received.append
        start = perf_counter()
        for event in events:
            put(event)
            keep(take())
        spent = perf_counter() - start
        seconds += spent if number > 0 else 0.0
        assert received == events
    queue.close()
    return seconds / count


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


def idle_latency(
    make: Callable[[int], Fanout],
    count: int,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    around: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    figure: Callable[[list[int]], float] = median,
) -> float:
    """Returns the time from a thread's `publish` to a task that slept, in seconds: the median, or
    another figure of them."""

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
        async with around():
            for _ in range(count):
                stamp = await recv()
                latencies.append(perf_counter_ns() - stamp)
                received.append(stamp)
        thread.join()
        assert received == sent
        fanout.close()
        return figure(latencies) / 1e9

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(case())


def uvloop_latency(make: Callable[[int], Fanout], count: int) -> float:
    """Returns the same on uvloop."""
    return idle_latency(make, count, uvloop.new_event_loop)


def busy_latency(
    make: Callable[[int], Fanout], count: int, figure: Callable[[list[int]], float] = median
) -> float:
    """Returns the same on asyncio, busy-polling for longer than the gap between two events.

    The loop's thread has a CPU of its own, which busy-polling needs.
    """
    cpus = os.sched_getaffinity(0)
    own = min(cpus)

    @asynccontextmanager
    async def busy() -> AsyncIterator[None]:
        os.sched_setaffinity(0, {own})
        async with tickbus.BusyPoll(max_spin=10 * IDLE_GAP_SECONDS, adaptive=False):
            yield

    # The publishing thread inherits this.
    os.sched_setaffinity(0, cpus - {own})
    try:
        return idle_latency(make, count, around=busy, figure=figure)
    finally:
        os.sched_setaffinity(0, cpus)


def hop(make: Callable[[int], Fanout], count: int) -> float:
    """Times handing an event to a task that sleeps, on one loop: publish, suspend, wake, read.

    Two tasks play ping-pong over two ways, so that each reads only after it slept.
    """

    async def case() -> float:
        there, back = make(1), make(1)
        ((recv_there,), (recv_back,)) = there.readers, back.readers
        events = make_events(count)

        async def echo() -> None:
            for _ in range(count):
                back.publish(await recv_there())

        received = []
        task = asyncio.create_task(echo())
        await asyncio.sleep(0)
        start = perf_counter()
        for event in events:
            there.publish(event)
            received.append(await recv_back())
        seconds = perf_counter() - start
        await task
        assert received == events
        there.close()
        back.close()
        return seconds / (2 * count)

    return asyncio.run(case())


def fanout_to_sleepers(make: Callable[[int], Fanout], subscribers: int, count: int) -> float:
    """Times one publish until every one of the tasks that slept has the event, on one loop."""

    async def case() -> float:
        fanout = make(subscribers)
        events = make_events(count)
        served = 0

        async def read(recv: Get) -> list[Any]:
            nonlocal served
            received = []
            for _ in range(count):
                received.append(await recv())
                served += 1
            return received

        tasks = [asyncio.create_task(read(recv)) for recv in fanout.readers]
        await asyncio.sleep(0)
        wanted = 0
        start = perf_counter()
        for event in events:
            wanted += subscribers
            fanout.publish(event)
            while served < wanted:  # noqa: ASYNC110 - an Event would need one more step
                await asyncio.sleep(0)
        seconds = perf_counter() - start
        results = await asyncio.gather(*tasks)
        assert all(received == events for received in results)
        fanout.close()
        return seconds / count

    return asyncio.run(case())


def wake(make: Callable[[int], Fanout], count: int) -> float:
    """Times what it costs to wake a task from another thread, without the threads' own switches.

    A callback of the loop has the thread publish and waits for it, so that the task sleeps and the
    loop's next look at its descriptors finds the signal. What publishing took and what the loop
    took from there to the task are added.
    """

    async def case() -> float:
        fanout = make(1)
        (recv,) = fanout.readers
        events = make_events(count)
        turns: SimpleQueue[None] = SimpleQueue()
        published: SimpleQueue[float] = SimpleQueue()
        call_soon = asyncio.get_running_loop().call_soon
        publishing = waking = begun = 0.0

        def produce() -> None:
            for event in events:
                turns.get()
                start = perf_counter()
                fanout.publish(event)
                published.put(perf_counter() - start)

        def take_turn() -> None:
            nonlocal publishing, begun
            turns.put(None)
            publishing += published.get()
            begun = perf_counter()

        thread = threading.Thread(target=produce)
        thread.start()
        received = []
        for _ in range(count):
            call_soon(take_turn)
            event = await recv()
            waking += perf_counter() - begun
            received.append(event)
        thread.join()
        assert received == events
        fanout.close()
        return (publishing + waking) / count

    return asyncio.run(case())
