"""What is compared: tickbus and its peers, as ways from one publisher to `k` readers.

Peers are used through their cheapest documented calls, and without a bound where they have that.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import aiologic
import anyio
import culsans
import janus

import tickbus

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


def tickbus_fanout(subscribers: int, capacity: int = 16_384, backend: str = "lock_free") -> Fanout:
    """Returns a way over a bus whose subscriptions lose nothing while `capacity` events wait."""
    patience = tickbus.BackpressureConfig(max_block_duration=60.0)
    bus: tickbus.EventBus[Any] = tickbus.EventBus(backend, capacity, patience)
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


@dataclass(frozen=True)
class Queue:
    """A peer's queue, of which each reader has one.

    Attributes:
        put: Gives it one event; its cheapest call for an event from a thread or a loop.
        get: Gives an awaitable for the next event.
        take: Gives the next event without waiting.
        pending: Counts the events that are there.
        close: Ends the queue once everything was read.
    """

    put: Callable[[Any], object]
    get: Get
    take: Callable[[], Any]
    pending: Callable[[], int]
    close: Callable[[], None] = lambda: None


def tickbus_queue() -> Queue:
    """Returns a `LockFreeEventQueue` that holds all events of a case, as its peers do."""
    queue: tickbus.LockFreeEventQueue[Any] = tickbus.LockFreeEventQueue(131_072)
    return Queue(queue.enqueue, queue.dequeue_async, queue.try_dequeue, lambda: queue.size)


def simple_queue() -> Queue:
    """Returns a `queue.SimpleQueue`, for threads."""
    queue: SimpleQueue[Any] = SimpleQueue()

    async def get() -> Any:
        raise NotImplementedError("only threads get from it")

    return Queue(queue.put, get, queue.get_nowait, queue.qsize)


def asyncio_queue() -> Queue:
    """Returns an `asyncio.Queue`, for one thread."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    return Queue(queue.put_nowait, queue.get, queue.get_nowait, queue.qsize)


def anyio_stream() -> Queue:
    """Returns the two ends of an anyio memory object stream, for one thread."""
    sending, receiving = anyio.create_memory_object_stream[Any](math.inf)

    def close() -> None:
        sending.close()
        receiving.close()

    def pending() -> int:
        return receiving.statistics().current_buffer_used

    return Queue(sending.send_nowait, receiving.receive, receiving.receive_nowait, pending, close)


def aiologic_queue() -> Queue:
    """Returns an aiologic `SimpleQueue`."""
    queue: aiologic.SimpleQueue[Any] = aiologic.SimpleQueue()
    take = partial(queue.green_get, blocking=False)
    return Queue(queue.put, queue.async_get, take, queue.__len__)


def culsans_queue() -> Queue:
    """Returns a culsans `Queue`, used without its proxies."""
    queue: culsans.Queue[Any] = culsans.Queue()
    return Queue(queue.put_nowait, queue.async_get, queue.get_nowait, queue.qsize)


def janus_queue() -> Queue:
    """Returns a janus `Queue`."""
    queue: janus.Queue[Any] = janus.Queue()
    one, other = queue.sync_q, queue.async_q
    return Queue(one.put, other.get, one.get_nowait, one.qsize, queue.close)


def fanout_of(make: Callable[[], Queue], subscribers: int) -> Fanout:
    """Returns a way over a queue for each reader."""
    queues = [make() for _ in range(subscribers)]

    def close() -> None:
        for queue in queues:
            queue.close()

    return Fanout(_to_each([q.put for q in queues]), [q.get for q in queues], [], close)


def call_soon_fanout(subscribers: int) -> Fanout:
    """Returns a way from another thread: `call_soon_threadsafe` once for each event."""
    call_soon = asyncio.get_running_loop().call_soon_threadsafe
    local = fanout_of(asyncio_queue, subscribers)
    put = local.publish
    return Fanout(lambda event: call_soon(put, event), local.readers, [])


def call_soon_future(_subscribers: int) -> Fanout:
    """Returns the textbook way to wake one task: a thread has the loop set a future's result."""
    loop = asyncio.get_running_loop()
    call_soon = loop.call_soon_threadsafe
    future: asyncio.Future[Any] = loop.create_future()

    def recv() -> asyncio.Future[Any]:
        nonlocal future
        future = loop.create_future()
        return future

    return Fanout(lambda event: call_soon(future.set_result, event), [recv], [])


def eventfd_future(_subscribers: int) -> Fanout:
    """Returns the same with an eventfd, whose reader on the loop sets the future's result."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    events: deque[Any] = deque()
    descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def on_readable() -> None:
        os.eventfd_read(descriptor)
        future.set_result(events.popleft())

    def recv() -> asyncio.Future[Any]:
        nonlocal future
        future = loop.create_future()
        return future

    def publish(event: Any) -> None:
        events.append(event)
        os.eventfd_write(descriptor, 1)

    def close() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)

    loop.add_reader(descriptor, on_readable)
    return Fanout(publish, [recv], [], close)


def _to_each(puts: list[Callable[[Any], object]]) -> Callable[[Any], object]:
    if len(puts) == 1:
        return puts[0]

    def publish(event: Any) -> None:
        for put in puts:
            put(event)

    return publish


QUEUES = {
    "asyncio.Queue": asyncio_queue,
    "anyio": anyio_stream,
    "aiologic": aiologic_queue,
    "culsans": culsans_queue,
    "janus": janus_queue,
}
#: Ways to the tasks of one loop.
LOCAL_WAYS = {
    "tickbus": tickbus_fanout,
    **{name: partial(fanout_of, queue) for name, queue in QUEUES.items()},
}
#: Ways from a thread; anyio's streams have none.
THREADED_WAYS = {
    "tickbus": tickbus_fanout,
    "call_soon_threadsafe": call_soon_fanout,
    **{name: LOCAL_WAYS[name] for name in ("aiologic", "culsans", "janus")},
}
#: Ways to one task that sleeps, from a thread.
WAKING_WAYS = {
    "tickbus": tickbus_fanout,
    "Future, call_soon_threadsafe": call_soon_future,
    **({"Future, eventfd": eventfd_future} if hasattr(os, "eventfd") else {}),
}
#: Queues that many producers and consumers share; what tasks cannot await stands apart.
SHARED_QUEUES = {
    "tickbus": tickbus_queue,
    **{name: QUEUES[name] for name in ("aiologic", "culsans", "janus")},
}
LOCAL_QUEUES = {
    **SHARED_QUEUES,
    "asyncio.Queue": asyncio_queue,
}
THREAD_QUEUES = {**LOCAL_QUEUES, "SimpleQueue": simple_queue}
