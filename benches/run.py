"""Measures the Python targets and prints for each the target, the ratio and pass or fail.

What is compared takes turns in rounds of one run; the figures are medians over the rounds, and the
ratio is the median of the best peer, or of the one that the target names, over tickbus's. The exit
status is 1 when a target is missed or an event was not received as it was published.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import median

import cases
import compact
import fanouts

import tickbus

_LEAST_ROUNDS = 5
_PEERS = ("aiologic", "anyio", "blinker", "culsans", "janus", "pyee", "uvloop")
_PATTERNS = 256
_SLEEPERS = 16
#: Events for each measurement: multiples of `cases.FILL` and `cases.BATCH`.
_LOCAL_EVENTS = 16 * cases.FILL
_THREADED_EVENTS = {1: 128 * cases.FILL, 16: 8 * cases.FILL}
_SLEEPING_EVENTS = 2 * cases.FILL
_IDLE_EVENTS = 1_000
#: By subscribers.
_PUBLISH_TARGETS = {1: 3.0, 4: 7.0, 16: 10.0, 64: 10.0}
_RING_TARGETS = {1: 6.0, 4: 20.0, 16: 80.0, 64: None}
#: What the interpreter itself does for an await differs between its versions.
_READY_TARGET = 2.5 if (3, 12) <= sys.version_info < (3, 14) else 3.5
_HOP_TARGET = 1.3 if sys.version_info < (3, 12) else 1.15
#: A cost that does not grow: at most 1.25 times that of the smaller case.
_FLAT_TARGET = 0.8
#: A cost that does not depend on the number of subscribers: at most 1.15 times that of one.
_LEVEL_TARGET = 0.87
#: Many at once: at most 0.35 times the cost of each by itself.
_MANY_TARGET = 2.86
#: A cost that is small beside the rest: at most 1.1 times that of going without.
_SAMPLING_TARGET = 0.91
#: Waking an idle loop from a thread that has no need of the interpreter.
_NATIVE_TARGET = 2.0
#: Seconds for each event of an array.
_ARRAY_LIMIT = 8e-9

Case = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One line of the table: `ours` costs so many times less than the cheapest of its peers.

    Attributes:
        name: What is measured.
        target: The least ratio; `None` where none is promised.
        ours: The case of tickbus.
        peers: What the target names; `None` takes all that are not of tickbus.
        limit: The most seconds per event, where that is the target.
    """

    name: str
    target: float | None
    ours: str = "tickbus"
    peers: tuple[str, ...] | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Cases that take turns, by name, and the rows that they make."""

    cases: dict[str, Case]
    rows: list[Row]


def comparisons() -> Iterator[Comparison]:
    """Yields everything that is measured, in the order of the table."""
    yield from _publishing()
    yield from _publishing_on_a_ring()
    yield from _publishing_compact_events()
    yield from _handling()
    yield from _reading()
    yield from _from_threads()
    yield from _busy_polling()
    yield from _sleeping()
    yield from _queueing()
    yield from _waking_by_rust()


def _publishing() -> Iterator[Comparison]:
    for k, target in _PUBLISH_TARGETS.items():
        count = max(_LOCAL_EVENTS // k, 2 * cases.FILL)
        yield Comparison(
            {
                "tickbus": partial(cases.publish_tickbus, k, count),
                "tickbus, Topic": partial(cases.publish_tickbus_topic, k, count),
                **{
                    name: partial(cases.publish_queues, queue, k, count)
                    for name, queue in fanouts.QUEUES.items()
                },
            },
            [
                Row(f"publish, {k} subscribers", target),
                Row(f"publish on a Topic, {k} subscribers", None, "tickbus, Topic"),
            ],
        )
    yield Comparison(
        {
            f"tickbus, {k} subscribers": partial(cases.publish_tickbus_each, k, 4 * cases.FILL)
            for k in (16, 64)
        },
        [
            Row(
                "publish, for each of 64 subscribers",
                _FLAT_TARGET,
                "tickbus, 64 subscribers",
                ("tickbus, 16 subscribers",),
            )
        ],
    )
    yield Comparison(
        {
            f"tickbus, 1 of {patterns}": partial(cases.publish_patterns, patterns, _LOCAL_EVENTS)
            for patterns in (1, _PATTERNS)
        },
        [
            Row(
                f"publish, wanted by 1 of {_PATTERNS} patterns",
                _FLAT_TARGET,
                f"tickbus, 1 of {_PATTERNS}",
                ("tickbus, 1 of 1",),
            )
        ],
    )
    sampled = partial(cases.publish_tickbus, 1, 4 * _LOCAL_EVENTS)
    yield Comparison(
        {"tickbus": sampled, "tickbus, no samples": partial(sampled, latency_sampling=None)},
        [
            Row(
                "publish, with latency sampling",
                _SAMPLING_TARGET,
                "tickbus",
                ("tickbus, no samples",),
            )
        ],
    )


def _publishing_on_a_ring() -> Iterator[Comparison]:
    on_ring = partial(cases.publish_tickbus, backend="ring")
    for k, target in _RING_TARGETS.items():
        count = max(_LOCAL_EVENTS // k, 2 * cases.FILL)
        yield Comparison(
            {
                "tickbus ring": partial(on_ring, k, count),
                "asyncio.Queue": partial(
                    cases.publish_queues, fanouts.QUEUES["asyncio.Queue"], k, count
                ),
            },
            [Row(f"ring: publish, {k} subscribers", target, "tickbus ring", ("asyncio.Queue",))],
        )
    yield Comparison(
        {
            "tickbus ring, 16 subscribers": partial(on_ring, 16, 4 * cases.FILL),
            "tickbus ring, 1 subscriber": partial(on_ring, 1, 4 * cases.FILL),
            "tickbus ring, publish_many": partial(on_ring, 1, 4 * cases.FILL, many=True),
        },
        [
            Row(
                "ring: publish to 16 against 1",
                _LEVEL_TARGET,
                "tickbus ring, 16 subscribers",
                ("tickbus ring, 1 subscriber",),
            ),
            Row(
                "ring: publish_many, for each event",
                _MANY_TARGET,
                "tickbus ring, publish_many",
                ("tickbus ring, 1 subscriber",),
            ),
        ],
    )


def _publishing_compact_events() -> Iterator[Comparison]:
    yield Comparison(
        {
            "tickbus": partial(compact.publish_system, _LOCAL_EVENTS),
            "asyncio.PriorityQueue": partial(compact.publish_priority_queue, _LOCAL_EVENTS),
        },
        [Row("EventSystem: publish", None)],
    )
    yield Comparison(
        {
            "tickbus": partial(compact.ready_system, _LOCAL_EVENTS),
            "asyncio.PriorityQueue": partial(compact.ready_priority_queue, _LOCAL_EVENTS),
        },
        [Row("EventSystem: ready recv", None)],
    )
    yield Comparison(
        {
            "tickbus publish": partial(compact.publish_system, _LOCAL_EVENTS),
            "tickbus recv": partial(compact.ready_system, _LOCAL_EVENTS),
            "tickbus publish_batch": partial(compact.publish_array, _LOCAL_EVENTS),
            "tickbus recv_array": partial(compact.recv_array, _LOCAL_EVENTS),
            "tickbus recv_into": partial(compact.recv_into, _LOCAL_EVENTS),
        },
        [
            Row(
                f"EventSystem: {call}, {compact.ARRAY} events, each",
                None,
                f"tickbus {call}",
                (f"tickbus {single}",),
                _ARRAY_LIMIT,
            )
            for call, single in (
                ("publish_batch", "publish"),
                ("recv_array", "recv"),
                ("recv_into", "recv"),
            )
        ],
    )


def _handling() -> Iterator[Comparison]:
    for k in (1, 4, 16):
        count = _LOCAL_EVENTS // k
        yield Comparison(
            {
                "tickbus": partial(cases.handle_tickbus, k, count),
                "pyee": partial(cases.handle_pyee, k, count),
                "blinker": partial(cases.handle_blinker, k, count),
            },
            [Row(f"publish, then try_recv and call, {k} handlers", None)],
        )


def _reading() -> Iterator[Comparison]:
    yield Comparison(
        {
            "tickbus recv": partial(cases.ready_recv, _LOCAL_EVENTS),
            "tickbus recv_many": partial(cases.ready_recv_many, _LOCAL_EVENTS),
            **{
                name: partial(cases.ready_queue, queue, _LOCAL_EVENTS)
                for name, queue in fanouts.QUEUES.items()
            },
        },
        [
            Row("ready recv", _READY_TARGET, "tickbus recv"),
            Row("ready recv_many(64)", 3.0, "tickbus recv_many", ("tickbus recv",)),
        ],
    )
    yield Comparison(
        {
            "tickbus ring, recv": partial(cases.ready_recv, _LOCAL_EVENTS, "ring"),
            "tickbus ring, recv_many": partial(cases.ready_recv_many, _LOCAL_EVENTS, "ring"),
        },
        [
            Row(
                "ring: ready recv_many(64)",
                _MANY_TARGET,
                "tickbus ring, recv_many",
                ("tickbus ring, recv",),
            )
        ],
    )


def _from_threads() -> Iterator[Comparison]:
    for k, count in _THREADED_EVENTS.items():
        case = partial(cases.thread_to_asyncio, subscribers=k, count=count)
        in_batches = partial(case, fanouts.tickbus_fanout, batch=cases.BATCH)
        yield Comparison(
            {
                **{name: partial(case, way) for name, way in fanouts.THREADED_WAYS.items()},
                "tickbus, recv_many": in_batches,
            },
            [
                Row(f"thread to asyncio, recv, {k} subscribers", 5.0),
                Row(f"thread to asyncio, recv_many, {k} subscribers", 8.0, "tickbus, recv_many"),
            ],
        )
    for loop, latency in {"": cases.idle_latency, " on uvloop": cases.uvloop_latency}.items():
        yield Comparison(
            {
                name: partial(latency, way, _IDLE_EVENTS)
                for name, way in fanouts.THREADED_WAYS.items()
            },
            [Row(f"idle one-way p50{loop}", 1.0)],
        )
    yield Comparison(
        {
            name: partial(cases.wake, way, _SLEEPING_EVENTS)
            for name, way in fanouts.WAKING_WAYS.items()
        },
        [Row("wake of one task from a thread", 1.5)],
    )


def _busy_polling() -> Iterator[Comparison]:
    asleep, busy = "tickbus, asleep", "tickbus, BusyPoll"
    yield Comparison(
        {
            asleep: partial(cases.idle_latency, fanouts.tickbus_fanout, _IDLE_EVENTS),
            busy: partial(cases.busy_latency, fanouts.tickbus_fanout, _IDLE_EVENTS),
        },
        [Row("idle one-way p50, busy-polling", 10.0, busy, (asleep,))],
    )


def _sleeping() -> Iterator[Comparison]:
    yield Comparison(
        {
            name: partial(cases.hop, way, _SLEEPING_EVENTS)
            for name, way in fanouts.LOCAL_WAYS.items()
        },
        [Row("hop to a sleeping task of the loop", _HOP_TARGET, peers=("asyncio.Queue",))],
    )
    yield Comparison(
        {
            name: partial(cases.fanout_to_sleepers, way, _SLEEPERS, _SLEEPING_EVENTS)
            for name, way in fanouts.LOCAL_WAYS.items()
        },
        [Row(f"publish to {_SLEEPERS} sleeping tasks of the loop", 2.2, peers=("asyncio.Queue",))],
    )


def _queueing() -> Iterator[Comparison]:
    yield Comparison(
        {
            name: partial(cases.put_and_take, queue, _LOCAL_EVENTS)
            for name, queue in fanouts.THREAD_QUEUES.items()
        },
        [Row("queue: put and take, one thread", None)],
    )
    yield Comparison(
        {
            name: partial(cases.ready_queue, queue, _LOCAL_EVENTS)
            for name, queue in fanouts.LOCAL_QUEUES.items()
        },
        [Row("queue: ready get in a task", None)],
    )
    yield Comparison(
        {
            name: partial(cases.hop, partial(fanouts.fanout_of, queue), _SLEEPING_EVENTS)
            for name, queue in fanouts.LOCAL_QUEUES.items()
        },
        [Row("queue: hop to a sleeping task of the loop", None)],
    )
    case = partial(cases.thread_to_asyncio, subscribers=1, count=_THREADED_EVENTS[1])
    yield Comparison(
        {
            "asyncio.Queue, call_soon_threadsafe": partial(case, fanouts.call_soon_fanout),
            **{
                name: partial(case, partial(fanouts.fanout_of, queue))
                for name, queue in fanouts.SHARED_QUEUES.items()
            },
        },
        [Row("queue: thread to asyncio", None)],
    )


def _waking_by_rust() -> Iterator[Comparison]:
    if hasattr(tickbus._core, "_NativeFeed"):
        yield Comparison(
            {
                name: partial(compact.native_latency, waking, _IDLE_EVENTS)
                for name, waking in (
                    ("tickbus", compact.by_tickbus),
                    ("call_soon_threadsafe", compact.by_call_soon),
                )
            },
            [Row("idle one-way p50, recv_array, from a Rust thread", _NATIVE_TARGET)],
        )
    else:
        print("no rows of Rust threads: the module lacks the feature native-producer")


def measure(comparison: Comparison, rounds: int) -> dict[str, float]:
    """Runs the cases in turn, `rounds` times, and returns medians in seconds per event."""
    found: dict[str, list[float]] = {name: [] for name in comparison.cases}
    for _ in range(rounds):
        for name, case in comparison.cases.items():
            gc.collect()
            found[name].append(case())
    return {name: median(seconds) for name, seconds in found.items()}


def main() -> int:
    """Measures, prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 (default: 7)")
    parser.add_argument("--only", default="", help="measure the rows whose names contain this")
    arguments = parser.parse_args()
    if arguments.rounds < _LEAST_ROUNDS:
        parser.error(f"--rounds was {arguments.rounds}; it must be at least {_LEAST_ROUNDS}")

    print(
        f"tickbus {tickbus.__version__}, {platform.python_implementation()} "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}; "
        f"{', '.join(f'{peer} {version(peer)}' for peer in _PEERS)}; "
        f"medians of {arguments.rounds} alternating rounds, per event"
    )
    empty = median(cases.empty_loop(_LOCAL_EVENTS) for _ in range(arguments.rounds))
    print(f"the empty loop of the publishing cases takes {empty * 1e9:.1f} ns and is included\n")
    print("| measured | tickbus | compared with | target | ratio | verdict | other peers |")
    print("|---|---:|---|---:|---:|---|---|")
    missed = 0
    for comparison in comparisons():
        rows = [row for row in comparison.rows if arguments.only in row.name]
        medians = measure(comparison, arguments.rounds) if rows else {}
        for row in rows:
            missed += _print(row, medians)
    print(f"\n{missed} missed" if missed else "\nall targets met")
    return 1 if missed else 0


def _print(row: Row, medians: dict[str, float]) -> bool:
    """Prints a line of the table and returns whether its target was missed."""
    all_peers = [name for name in medians if not name.startswith("tickbus")]
    best = min(row.peers or all_peers, key=medians.__getitem__)
    others = sorted(set(all_peers) - {best}, key=medians.__getitem__) if best in all_peers else []
    ratio = medians[best] / medians[row.ours]
    missed = (row.target is not None and ratio < row.target) or (
        row.limit is not None and medians[row.ours] > row.limit
    )
    target = "" if row.target is None else f"{row.target:.4g}x"
    if row.limit is not None:
        target = f"<= {duration(row.limit)}"
    columns = (
        row.name,
        duration(medians[row.ours]),
        f"{best} {duration(medians[best])}",
        target,
        f"{ratio:.2f}x",
        verdict(target != "", missed),
        ", ".join(f"{name} {duration(medians[name])}" for name in others),
    )
    print(f"| {' | '.join(columns)} |", flush=True)
    return missed


def verdict(is_promised: bool, missed: bool) -> str:
    """Returns how a verdict is written."""
    return ("FAIL" if missed else "pass") if is_promised else ""


def duration(seconds: float) -> str:
    nanoseconds = seconds * 1e9
    if nanoseconds < 10_000:
        return f"{nanoseconds:.1f} ns"
    return f"{nanoseconds / 1_000:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
