"""What several test files share: reading with the holes in their place, and closing the sums."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvloop

import tickbus
from tickbus import _core

BACKENDS = ("lock_free", "broadcast", "ring")
RELEASING_BACKENDS = ("lock_free", "broadcast")
"""Those that let go of an event once everybody has received it; a ring keeps it until it has come
round."""
POLICIES = {
    "lock_free": ("block", "reject", "drop_newest", "drop_oldest", "conflate"),
    "broadcast": ("drop_oldest", "conflate"),
    "ring": ("block", "reject", "drop_oldest", "conflate"),
}


class LoopWithoutReaders(asyncio.SelectorEventLoop):
    """A loop that cannot wait for descriptors of others, as the proactor loop of Windows."""

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        raise NotImplementedError


def _debugging_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    loop.set_debug(True)
    loop.slow_callback_duration = PATIENCE_WITHOUT_END
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
    "debug": _debugging_loop,
    "without_add_reader": LoopWithoutReaders,
    "without_eventfd": asyncio.SelectorEventLoop,
}
"""What makes each kind of loop; the last one also needs `TICKBUS_EVENTFD=0`."""
PATIENCE_WITHOUT_END = 3_600.0
"""Seconds; a test that really waits for so long is ended by its timeout."""

Subscription = tickbus.EventSubscription[Any] | tickbus.AsyncEventSubscription[Any]
MakeBus = Callable[..., tickbus.EventBus[Any]]


@dataclass(frozen=True)
class Hole:
    """Stands in a list of received events where `Lagged` was raised."""

    missed: int


def read_all(subscription: Subscription) -> list[Any]:
    """Returns what can be read without waiting, each hole in its place."""
    received: list[Any] = []
    while True:
        try:
            event = subscription.try_recv()
        except tickbus.Lagged as lagged:
            received.append(Hole(lagged.missed))
            continue
        except tickbus.Closed:
            return received
        if event is None:
            return received
        received.append(event)


def read_to_the_end(subscription: tickbus.EventSubscription[Any]) -> list[Any]:
    """Returns what a blocking reader gets until the close, each hole in its place."""
    received: list[Any] = []
    while True:
        try:
            received.append(subscription.recv())
        except tickbus.Lagged as lagged:
            received.append(Hole(lagged.missed))
        except tickbus.Closed:
            return received


def drops(**reasons: int) -> dict[str, int]:
    """Returns the drop counters with the given ones set and all others 0."""
    counters = dict.fromkeys(("overwritten", "refused", "block_expired", "conflated", "closed"), 0)
    assert reasons.keys() <= counters.keys()
    return counters | reasons


def row_of(bus: tickbus.EventBus[Any], subscription: Subscription) -> tickbus.SubscriptionMetrics:
    """Returns the subscription's row of the bus's metrics."""
    (row,) = [row for row in bus.metrics().subscriptions if row.id == subscription.id]
    return row


def assert_sums_closed(bus: tickbus.EventBus[Any]) -> None:
    """Checks, for every open subscription, that each offered event is accounted for once."""
    metrics = bus.metrics()
    assert metrics.subscriber_count == len(metrics.subscriptions)
    for row in metrics.subscriptions:
        assert row.offered == row.delivered + sum(row.dropped.values()) + row.pending, row


def assert_holes_exact(received: list[Any], first: int, last: int) -> None:
    """Checks that numbered events and holes tile `first..last` without gap and without overlap."""
    expected = first
    for item in received:
        if isinstance(item, Hole):
            assert item.missed >= 1
            expected += item.missed
        else:
            assert item == expected
            expected += 1
    assert expected == last + 1


async def spin(turns: int = 10) -> None:
    """Lets every other ready task of the loop take `turns` steps."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def cancel(task: asyncio.Task[Any]) -> bool:
    """Cancels until the task has ended, and returns whether it ended as cancelled.

    `asyncio.wait_for` of CPython 3.11 may swallow a cancellation, so one request may be too few.
    """
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    if task.cancelled():
        return True
    task.exception()
    return False


def run(awaitable: Callable[[], Awaitable[Any]]) -> Any:
    """Runs what the function returns on a new event loop."""

    async def main() -> Any:
        return await awaitable()

    return asyncio.run(main())


def run_child(script: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs a script in a new interpreter with warnings as errors, for at most `timeout` seconds."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def native_feed(system: tickbus.EventSystem, events: list[tickbus.Event]) -> Any:
    """Returns a thread that Python does not know, which publishes the events."""
    assert hasattr(_core, "_NativeFeed"), (
        "the module lacks the feature native-producer: build it by `make test`"
    )
    return _core._NativeFeed(system, events)
