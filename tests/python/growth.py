"""How much memory events leave behind."""

from __future__ import annotations

from support import run_child

MOST_BYTES = 1_000_000

MEASURE = """
import asyncio, gc, itertools, os, warnings, weakref
import tickbus

def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

class Event:
    pass
"""

_EVENTS = """
def run(bus, first, second, count):
    received = 0
    for batch in range(count // 1_000):
        bus.publish_many(range(batch, batch + 1_000))
        received += len(first.recv_many(1_000))
        if batch % 2:
            received += len(second.recv_many(2_000))
    return received

with tickbus.EventBus({backend!r}, 2_048) as bus:
    with bus.subscribe() as first, bus.subscribe() as second:
        run(bus, first, second, 1_000_000)
        before = resident_bytes()
        received = run(bus, first, second, {events})
        grown = resident_bytes() - before
        rows = bus.metrics().subscriptions
        assert all(row.offered == row.delivered == 1_000_000 + {events} for row in rows), rows
        assert received == 2 * {events}
print(grown)
"""


def bytes_grown_by(events: int, backend: str, timeout: float = 60.0) -> int:
    """Returns by how much an interpreter's resident set grew while two subscriptions read them."""
    script = MEASURE + _EVENTS.format(backend=backend, events=events)
    child = run_child(script, timeout)
    assert (child.returncode, child.stderr) == (0, ""), child.stderr
    return int(child.stdout)
