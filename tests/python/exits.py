"""Interpreters that end in the middle of things: what each does before it ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

AT_ONCE = 4
TIMEOUT_SECONDS = 60.0

_BEGINNING = """
import asyncio, itertools, sys, threading, time
import tickbus

patient = tickbus.BackpressureConfig(max_block_duration=3600.0)
started = []

def start(call, *arguments):
    ready = threading.Event()
    started.append(ready)

    def target():
        ready.set()
        try:
            call(*arguments)
        except tickbus.Closed:
            pass

    threading.Thread(target=target, daemon=True).start()

def flat_out(bus):
    while True:
        bus.publish("event")

def without_end(bus):
    for number in itertools.count():
        try:
            bus.publish(number)
        except tickbus.Closed:
            pass

async def read(subscription):
    while True:
        try:
            await subscription.recv()
        except tickbus.Lagged:
            pass

async def read_with(count, subscription):
    await asyncio.gather(*(read(subscription) for _ in range(count)))

def run(coroutine):
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(coroutine)
    finally:
        loop.close()

def native(bus):
    from tickbus._core import _NativeProducer

    producer = _NativeProducer(bus, ("made", "beforehand"))
    while not producer.published:
        time.sleep(0)
    return producer
"""

_END = """
for ready in started:
    ready.wait()
print("end")
"""

SCENARIOS = {
    "waiting_readers": """
        bus = tickbus.EventBus({backend!r})
        subscriptions = [bus.subscribe() for _ in range(4)]
        start(subscriptions[0].recv)
        start(subscriptions[1].recv_timeout, 3600.0)
        start(subscriptions[2].recv_many, 10)
        start(list, subscriptions[3])
        start(tickbus.select, subscriptions)
        start(tickbus.select, subscriptions[:1], tickbus.Shutdown(), 3600.0)
    """,
    "waiting_publishers": """
        bus = tickbus.LockFreeEventBus(1, patient)
        full, refusing = bus.subscribe("full"), bus.subscribe("refusing", policy="reject")
        bus.publish(0, "full")
        bus.publish(0, "refusing")
        start(bus.publish, 1, "full")
        start(bus.publish_many, [1, 2], "full")
        start(bus.publish_timeout, 1, 3600.0, "refusing")
        start(lambda: run(bus.publish_async(1, "full")))
    """,
    "publishers_flat_out": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        idle, busy = bus.subscribe(), bus.subscribe(on_lag="count")
        for _ in range(2):
            start(flat_out, bus)
            start(list, busy)
        start(without_end, bus)
    """,
    "a_loop_in_a_daemon_thread": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        quiet = tickbus.EventBus({backend!r})
        subscriptions = bus.subscribe_async(), quiet.subscribe_async()
        start(flat_out, bus)
        for subscription in subscriptions:
            start(run, read_with(3, subscription))
    """,
    "a_step_of_a_task_that_was_woken": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        subscription = bus.subscribe_async(on_lag="count")
        stepped = threading.Event()
        started.append(stepped)

        async def compute():
            while True:
                await subscription.recv()
                stepped.set()
                for _ in range(1_000_000):
                    pass

        start(flat_out, bus)
        start(run, compute())
    """,
    "a_loop_abandoned_with_waiters": """
        import warnings

        # Said by asyncio about a loop that nobody closed, whatever its tasks wait for.
        warnings.filterwarnings("ignore", "unclosed event loop", ResourceWarning)
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        subscription = bus.subscribe_async()
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        readers = [loop.create_task(read(subscription)) for _ in range(3)]
        loop.run_until_complete(asyncio.sleep(0))
        start(flat_out, bus)
    """,
    "a_native_producer_and_a_loop": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        subscription = bus.subscribe_async()
        start(run, read_with(3, subscription))
        producer = native(bus)
    """,
    "a_native_producer_and_a_reader": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        subscription = bus.subscribe(on_lag="count")
        start(list, subscription)
        producer = native(bus)
    """,
    "a_native_producer_that_waits_for_room": """
        bus = tickbus.LockFreeEventBus(1, patient)
        subscription = bus.subscribe()
        producer = native(bus)
        assert producer.published == 1
    """,
    "python_code_inside_calls_of_the_bus": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        lagging = bus.subscribe()
        narrow = tickbus.LockFreeEventBus(1)
        full = narrow.subscribe(policy="reject")

        class Event:
            def __init__(self):
                self.links = [number for number in range(10)]

            def __del__(self):
                self.links = [number for number in range(10)]

        def generate_flat_out():
            while True:
                bus.publish_many(Event() for _ in range(100))

        def lag_flat_out():
            while True:
                try:
                    lagging.recv()
                except tickbus.Lagged:
                    pass

        def refuse_flat_out():
            while True:
                try:
                    narrow.publish(Event())
                except tickbus.Full:
                    pass

        for call in (generate_flat_out, lag_flat_out, refuse_flat_out):
            start(call)
    """,
    "everything_at_once": """
        bus = tickbus.EventBus({backend!r}, 8, tickbus.BackpressureConfig(drop_oldest=True))
        narrow = tickbus.LockFreeEventBus(1, patient)
        idle = narrow.subscribe()
        warned = tickbus.LockFreeEventBus(2, tickbus.BackpressureConfig(True, 1))
        watched = warned.subscribe()
        start(without_end, warned)
        start(run, read(bus.subscribe_async()))
        start(list, bus.subscribe(on_lag="count"))
        start(flat_out, bus)
        producers = native(bus), native(narrow)
        start(flat_out, narrow)

        def open_and_close():
            while True:
                with tickbus.EventBus({backend!r}) as short, short.subscribe() as reader:
                    short.publish("event")
                    reader.recv()

        start(open_and_close)
    """,
}


def end_in(scenario: str, backend: str) -> str | None:
    """Runs one interpreter and returns what is wrong with its end."""
    script = _BEGINNING + textwrap.dedent(SCENARIOS[scenario]).format(backend=backend) + _END
    try:
        child = subprocess.run(
            [sys.executable, "-W", "error", "-X", "faulthandler", "-c", script],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as hung:
        return f"{scenario} on {backend} hung: {hung.stdout!r} {hung.stderr!r}"
    if (child.returncode, child.stdout, child.stderr) == (0, "end\n", ""):
        return None
    return f"{scenario} on {backend} ended with {child.returncode}: {child.stderr}"


def end_all(runs: Iterable[tuple[str, str]]) -> list[str]:
    """Runs interpreters, a few at a time, and returns what is wrong with any."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [wrong for wrong in pool.map(lambda run: end_in(*run), runs) if wrong]
