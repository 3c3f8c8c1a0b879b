"""Measures the promised figures in Python, for every backend and number of subscribers.

The exit status is 1 when one was not kept. The backends take turns in rounds; a figure is the
median over the rounds.

- *Publish p50* is of whole fills of 1,024 events, as in `run.py`; *p99* is of single calls, each
  less what the clock itself takes.
- *Events a second*: from a thread that publishes flat out until every task of a loop has read
  everything. As many events may wait as are published: nothing can be lost, on any backend, and
  each task compares what it has with what was published.
- *Thread to thread* is one way of a ping-pong between two threads in `recv()`, and *to a
  busy-polling loop* from a thread to a task inside `tickbus.BusyPoll`.
- *Bytes allocated* is the most that publishing and receiving have at a time of Python's memory.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from time import perf_counter_ns
from typing import Any

import cases
import compact
import fanouts
from run import duration, verdict

import tickbus

_BACKENDS = ("lock_free", "broadcast", "ring")
_SYSTEM = "EventSystem"
_SUBSCRIBERS = (1, 4, 16)
_EVENTS = 16 * cases.FILL
_HOPS = 4_000
_IDLE_EVENTS = 500
_SIGNALLED_EVENTS = 200
#: Times that are averaged before a median is taken of them.
_AVERAGED = 16

Case = Callable[[], float]


@dataclass(frozen=True)
class Promise:
    """One line of the table.

    Attributes:
        name: What is promised.
        target: It in words.
        cases: What is measured, by column.
        is_kept: Whether a figure keeps it.
        show: How a figure is written.
    """

    name: str
    target: str
    cases: dict[str, Case]
    is_kept: Callable[[float], bool]
    show: Callable[[float], str] = duration


def promises() -> Iterator[Promise]:
    """Yields the lines in their order."""
    for k in _SUBSCRIBERS:
        p50 = {b: partial(cases.publish_tickbus, k, _EVENTS, backend=b) for b in _BACKENDS}
        p50[_SYSTEM] = partial(compact.publish_system, _EVENTS, k)
        yield Promise(f"publish p50, {k} subscribers", "< 1 us", p50, lambda s: s < 1e-6)
        p99 = {column: partial(_publish_p99, column, k) for column in (*_BACKENDS, _SYSTEM)}
        yield Promise(f"publish p99, {k} subscribers", "< 1 us", p99, lambda s: s < 1e-6)
    for k in _SUBSCRIBERS:
        yield Promise(
            f"events a second, {k} tasks, 0 lost, in order",
            ">= 1 M/s",
            {backend: partial(_stream, backend, k) for backend in _BACKENDS},
            lambda seconds: seconds <= 1e-6,
            lambda seconds: f"{1e-6 / seconds:.2f} M/s",
        )
    yield Promise(
        "thread to thread, parked, p99",
        "< 10 us",
        {backend: partial(_ping_pong_p99, backend) for backend in _BACKENDS},
        lambda seconds: seconds < 1e-5,
    )
    yield Promise(
        "thread to a busy-polling loop, p99",
        "< 10 us",
        {backend: partial(_busy_p99, backend) for backend in _BACKENDS},
        lambda seconds: seconds < 1e-5,
    )
    for k in _SUBSCRIBERS:
        yield Promise(
            f"bytes allocated by publish and try_recv, {k} subscribers",
            "0",
            {backend: partial(_allocated, backend, k) for backend in _BACKENDS},
            lambda count: count == 0,
            "{:.0f}".format,
        )
    yield Promise(
        "bytes of an event",
        "32",
        {_SYSTEM: lambda: len(bytes(compact.make_events(1)[0]))},
        lambda count: count == 32,
        "{:.0f}".format,
    )
    if hasattr(tickbus._core, "_NativeFeed"):
        yield Promise(
            "signals of a loop by a Rust thread's publish, 16 tasks",
            "1",
            {_SYSTEM: partial(compact.signals_of_a_publish, 16, _SIGNALLED_EVENTS)},
            lambda count: count == 1,
            "{:g}".format,
        )


def _p99(times: list[int]) -> float:
    return sorted(times)[round(0.99 * (len(times) - 1))]


def _clock_cost() -> float:
    """Returns what a pair of looks at the clock takes, in nanoseconds."""
    costs = []
    for _ in range(256):
        looks = [-perf_counter_ns() + perf_counter_ns() for _ in range(_AVERAGED)]
        costs.append(mean(looks))
    return median(costs)


def _publish_p99(column: str, k: int) -> float:
    """Returns p99 of single calls of `publish`, in seconds."""
    with ExitStack() as stack:
        bus: Any
        if column == _SYSTEM:
            bus = stack.enter_context(tickbus.EventSystem())
        else:
            bus = stack.enter_context(tickbus.EventBus(column, cases.FILL))
        subscriptions = [stack.enter_context(bus.subscribe()) for _ in range(k)]
        make = compact.make_events if column == _SYSTEM else cases.make_events
        publish, times = bus.publish, []
        for number in range(_EVENTS // cases.FILL + 1):
            events: list[Any] = make(cases.FILL)
            spent = []
            for event in events:
                start = perf_counter_ns()
                publish(event)
                spent.append(perf_counter_ns() - start)
            # The first fill makes the memory warm.
            times += spent if number > 0 else []
            for subscription in subscriptions:
                assert [subscription.try_recv() for _ in events] == events
        return (_p99(times) - _clock_cost()) / 1e9


def _stream(backend: str, k: int) -> float:
    make = partial(fanouts.tickbus_fanout, capacity=_EVENTS, backend=backend)
    return cases.thread_to_asyncio(make, k, _EVENTS, cases.BATCH)


def _ping_pong_p99(backend: str) -> float:
    """Returns p99 of one way between two threads that sleep in `recv()`, in seconds."""
    with ExitStack() as stack:
        there: tickbus.EventBus[Any] = stack.enter_context(tickbus.EventBus(backend, cases.FILL))
        back: tickbus.EventBus[Any] = stack.enter_context(tickbus.EventBus(backend, cases.FILL))
        recv_there = stack.enter_context(there.subscribe()).recv
        recv_back = stack.enter_context(back.subscribe()).recv

        def echo() -> None:
            for _ in range(_HOPS):
                back.publish(recv_there())

        thread = threading.Thread(target=echo)
        thread.start()
        times = []
        for event in cases.make_events(_HOPS):
            start = perf_counter_ns()
            there.publish(event)
            received = recv_back()
            times.append(perf_counter_ns() - start)
            assert received == event
        thread.join()
    return _p99(times) / 2e9


def _busy_p99(backend: str) -> float:
    make = partial(fanouts.tickbus_fanout, backend=backend)
    return cases.busy_latency(make, _IDLE_EVENTS, _p99)


def _allocated(backend: str, k: int) -> float:
    """Returns the bytes that publishing and receiving had at most at a time."""
    with ExitStack() as stack:
        bus: tickbus.EventBus[Any] = stack.enter_context(tickbus.EventBus(backend, cases.FILL))
        takes = [stack.enter_context(bus.subscribe()).try_recv for _ in range(k)]
        publish = bus.publish

        def pass_on(events: Iterator[Any]) -> int:
            # A loop over `takes` would make an iterator for each event.
            wrong = 0
            for event in events:
                publish(event)
                number = 0
                while number < k:
                    wrong += takes[number]() is not event
                    number += 1
            return wrong

        def most(count: int) -> int:
            events = iter(cases.make_events(count))
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            assert pass_on(events) == 0
            return tracemalloc.get_traced_memory()[1] - before

        tracemalloc.start()
        try:
            # What is allocated once does not count, nor what looking at it takes.
            return min(most(cases.FILL) for _ in range(5)) - min(most(0) for _ in range(5))
        finally:
            tracemalloc.stop()


def main() -> int:
    """Measures, prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--only", default="", help="measure the lines whose names contain this")
    arguments = parser.parse_args()
    columns = (*_BACKENDS, _SYSTEM)
    print(f"| promised | target | {' | '.join(columns)} |")
    print(f"|---|---|{'---:|' * len(columns)}")
    missed = 0
    for promise in promises():
        if arguments.only not in promise.name:
            continue
        found: dict[str, list[float]] = {column: [] for column in promise.cases}
        for _ in range(arguments.rounds):
            for column, case in promise.cases.items():
                gc.collect()
                found[column].append(case())
        cells = []
        for column in columns:
            if column not in found:
                cells.append("")
                continue
            figure = median(found[column])
            is_missed = not promise.is_kept(figure)
            missed += is_missed
            cells.append(f"{promise.show(figure)} {verdict(True, is_missed)}")
        print(f"| {promise.name} | {promise.target} | {' | '.join(cells)} |", flush=True)
    print(f"\n{missed} missed" if missed else "\nall promises kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
