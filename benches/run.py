"""Measures the Python targets and prints for each the target, the ratio and pass or fail.

Each target compares tickbus with its peers in alternating rounds of one run; the figures are
medians over the rounds, and the ratio is the best peer's median over tickbus's. The exit status is
1 when a target is missed or an event was not received as it was published.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import median

import cases

import tickbus

_LEAST_ROUNDS = 5
_SUBSCRIBERS = (1, 4, 16)
#: Events for each measurement: multiples of `cases.FILL` and `cases.BATCH`.
_LOCAL_EVENTS = 16 * cases.FILL
_THREADED_EVENTS = {1: 128 * cases.FILL, 16: 16 * cases.FILL}
_IDLE_EVENTS = 1_000
_PUBLISH_TARGETS = {1: 3.0, 4: 7.0, 16: 10.0}
#: CPython 3.12 and 3.13 let an awaitable finish by an exception only.
_READY_TARGET = 2.5 if (3, 12) <= sys.version_info < (3, 14) else 3.5

Case = Callable[[], float]


@dataclass(frozen=True)
class Comparison:
    """One target: `ours` costs so many times less than the cheapest of `peers`."""

    name: str
    target: float | None
    ours: Case
    peers: dict[str, Case]


@dataclass(frozen=True)
class Result:
    """Medians of one comparison, in seconds per event."""

    comparison: Comparison
    ours: float
    peer: str
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def verdict(self) -> str:
        target = self.comparison.target
        if target is None:
            return ""
        return "pass" if self.ratio >= target else "FAIL"


def comparisons() -> list[Comparison]:
    """Returns everything that is measured, in the order of the table."""
    found = []
    for k in _SUBSCRIBERS:
        peers: dict[str, Case] = {
            "asyncio.Queue": partial(cases.publish_queues, k, _LOCAL_EVENTS // k)
        }
        ours = partial(cases.publish_tickbus, k, _LOCAL_EVENTS // k)
        found.append(Comparison(f"publish, {k} subscribers", _PUBLISH_TARGETS[k], ours, peers))
        ours = partial(cases.publish_tickbus_topic, k, _LOCAL_EVENTS // k)
        found.append(Comparison(f"publish on a Topic, {k} subscribers", None, ours, peers))
    recv = partial(cases.ready_recv, _LOCAL_EVENTS)
    found.append(
        Comparison(
            "ready recv",
            _READY_TARGET,
            recv,
            {"asyncio.Queue.get": partial(cases.ready_queue_get, _LOCAL_EVENTS)},
        )
    )
    recv_many = partial(cases.ready_recv_many, _LOCAL_EVENTS)
    found.append(Comparison("ready recv_many(64)", 3.0, recv_many, {"tickbus recv": recv}))
    for k, count in _THREADED_EVENTS.items():
        threaded = partial(cases.thread_to_asyncio, subscribers=k, count=count)
        peers = {
            "aiologic": partial(threaded, cases.aiologic_fanout),
            "call_soon_threadsafe": partial(threaded, cases.threaded_queue_fanout),
        }
        one = partial(threaded, cases.tickbus_fanout)
        many = partial(threaded, cases.tickbus_fanout, batch=cases.BATCH)
        found.append(Comparison(f"thread to asyncio, recv, {k} subscribers", 5.0, one, peers))
        found.append(Comparison(f"thread to asyncio, recv_many, {k} subscribers", 8.0, many, peers))
    found.append(
        Comparison(
            "idle one-way p50",
            1.0,
            partial(cases.idle_latency, cases.tickbus_fanout, _IDLE_EVENTS),
            {
                "aiologic": partial(cases.idle_latency, cases.aiologic_fanout, _IDLE_EVENTS),
                "call_soon_threadsafe": partial(
                    cases.idle_latency, cases.threaded_queue_fanout, _IDLE_EVENTS
                ),
            },
        )
    )
    return found


def measure(comparison: Comparison, rounds: int) -> Result:
    """Runs the sides of a comparison in turn, `rounds` times."""
    ours = []
    theirs: dict[str, list[float]] = {name: [] for name in comparison.peers}
    for _ in range(rounds):
        gc.collect()
        ours.append(comparison.ours())
        for name, peer in comparison.peers.items():
            gc.collect()
            theirs[name].append(peer())
    best = min(theirs, key=lambda name: median(theirs[name]))
    return Result(comparison, median(ours), best, median(theirs[best]))


def main() -> int:
    """Measures, prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 (default: 7)")
    parser.add_argument("--only", default="", help="measure the names that contain this")
    arguments = parser.parse_args()
    if arguments.rounds < _LEAST_ROUNDS:
        parser.error(f"--rounds was {arguments.rounds}; it must be at least {_LEAST_ROUNDS}")

    print(
        f"tickbus {tickbus.__version__}, {platform.python_implementation()} "
        f"{platform.python_version()}, aiologic {version('aiologic')}, {platform.system()} "
        f"{platform.machine()}; medians of {arguments.rounds} alternating rounds, per event"
    )
    empty = median(cases.empty_loop(_LOCAL_EVENTS) for _ in range(arguments.rounds))
    print(f"the empty loop of the publishing cases takes {empty * 1e9:.1f} ns and is included\n")
    print("| measured | tickbus | best peer | target | ratio | verdict |")
    print("|---|---:|---|---:|---:|---|")
    missed = 0
    for comparison in comparisons():
        if arguments.only not in comparison.name:
            continue
        result = measure(comparison, arguments.rounds)
        target = "" if comparison.target is None else f"{comparison.target:.1f}x"
        print(
            f"| {comparison.name} | {_duration(result.ours)} | {result.peer} "
            f"{_duration(result.theirs)} | {target} | {result.ratio:.2f}x | {result.verdict} |",
            flush=True,
        )
        missed += result.verdict == "FAIL"
    print(f"\n{missed} missed" if missed else "\nall targets met")
    return 1 if missed else 0


def _duration(seconds: float) -> str:
    nanoseconds = seconds * 1e9
    if nanoseconds < 10_000:
        return f"{nanoseconds:.1f} ns"
    return f"{nanoseconds / 1_000:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
