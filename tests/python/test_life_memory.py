"""Memory over a long life: cycles are collected, and events leave nothing behind."""

from __future__ import annotations

import sys

import pytest

from growth import MEASURE, MOST_BYTES, bytes_grown_by
from support import run_child

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm"),
]


def test_a_hundred_thousand_cycles_of_bus_handler_and_event_are_collected(backend: str) -> None:
    child = run_child(
        f"""{MEASURE}
def make_cycle():
    bus = tickbus.EventBus({backend!r}, 1)
    subscription, tasks = bus.subscribe(), bus.subscribe_async()
    event = Event()

    def handler():
        return bus, subscription, tasks, event

    event.handler = handler
    bus.publish(event)
    bus.close()
    return weakref.ref(event), weakref.ref(bus)

def make(count):
    alive = 0
    for _ in range(count // 500):
        references = list(itertools.chain(*(make_cycle() for _ in range(500))))
        gc.collect()
        alive += sum(reference() is not None for reference in references)
    return alive

alive = make(10_000)
before = resident_bytes()
alive += make(100_000)
grown = resident_bytes() - before
print(alive, grown < 1_000_000, grown)
"""
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("0 True "), child.stdout


def test_abandoned_tasks_that_wait_with_their_bus_in_a_cycle_are_collected(backend: str) -> None:
    child = run_child(
        f"""{MEASURE}
async def read(bus, subscription, event):
    event.reader = asyncio.current_task()
    event.received = await subscription.recv()

async def make(count):
    alive = 0
    for _ in range(count // 500):
        references = []
        for _ in range(500):
            bus = tickbus.EventBus({backend!r}, 1)
            subscription, event = bus.subscribe_async(), Event()
            event.links = bus, subscription
            task = asyncio.create_task(read(bus, subscription, event))
            references += [weakref.ref(event), weakref.ref(bus)]
        await asyncio.sleep(0)
        assert not task.done()
        del bus, subscription, event, task
        gc.collect()
        alive += sum(reference() is not None for reference in references)
    return alive

async def main():
    # Abandoning them is what is tested; both warnings say so.
    warnings.simplefilter("ignore", ResourceWarning)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    alive = await make(5_000)
    before = resident_bytes()
    alive += await make(20_000)
    return alive, resident_bytes() - before

alive, grown = asyncio.run(main())
print(alive, grown < 1_000_000, grown)
"""
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("0 True "), child.stdout


def test_ten_million_events_grow_the_resident_set_by_less_than_a_megabyte(backend: str) -> None:
    assert bytes_grown_by(10_000_000, backend) < MOST_BYTES
