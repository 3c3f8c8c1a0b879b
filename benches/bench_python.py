"""The cases of `run.py` under pytest-benchmark, for distributions and comparisons over time.

Run with `pytest benches/bench_python.py`. Each case returns the seconds that one event took
without preparing and checking; that is the time that the table shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cases
import compact
import fanouts
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

_ROUNDS = 5
_EVENTS = 4 * cases.FILL


def _each(name: str, values: dict[str, object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, values.values(), ids=values)


class _SpentTime:
    """A clock that is moved by what a case says it took."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _run(benchmark: BenchmarkFixture, case: Callable[[], float]) -> None:
    clock = _SpentTime()
    benchmark._timer = clock

    def advance() -> None:
        clock.now += case()

    benchmark.pedantic(advance, rounds=_ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("subscribers", [1, 4, 16, 64])
@_each(
    "case",
    {
        "tickbus": cases.publish_tickbus,
        "tickbus_topic": cases.publish_tickbus_topic,
        **{name: partial(cases.publish_queues, queue) for name, queue in fanouts.QUEUES.items()},
    },
)
def test_publish(
    benchmark: BenchmarkFixture, case: Callable[[int, int], float], subscribers: int
) -> None:
    benchmark.group = f"publish to {subscribers}"
    _run(benchmark, lambda: case(subscribers, _EVENTS))


@pytest.mark.parametrize("patterns", [1, 256])
def test_publish_to_one_pattern(benchmark: BenchmarkFixture, patterns: int) -> None:
    benchmark.group = "publish, wanted by one pattern"
    _run(benchmark, lambda: cases.publish_patterns(patterns, _EVENTS))


@pytest.mark.parametrize("handlers", [1, 4, 16])
@_each(
    "case",
    {
        "tickbus_try_recv": cases.handle_tickbus,
        "pyee": cases.handle_pyee,
        "blinker": cases.handle_blinker,
    },
)
def test_handlers(
    benchmark: BenchmarkFixture, case: Callable[[int, int], float], handlers: int
) -> None:
    benchmark.group = f"{handlers} handlers"
    _run(benchmark, lambda: case(handlers, _EVENTS))


@_each(
    "case",
    {
        "recv": cases.ready_recv,
        "recv_many": cases.ready_recv_many,
        **{name: partial(cases.ready_queue, queue) for name, queue in fanouts.QUEUES.items()},
    },
)
def test_ready(benchmark: BenchmarkFixture, case: Callable[[int], float]) -> None:
    benchmark.group = "ready"
    _run(benchmark, lambda: case(_EVENTS))


@_each("make", fanouts.THREADED_WAYS)
@pytest.mark.parametrize("subscribers", [1, 16])
def test_thread_to_asyncio(
    benchmark: BenchmarkFixture, make: Callable[[int], fanouts.Fanout], subscribers: int
) -> None:
    benchmark.group = f"thread to {subscribers} tasks"
    _run(benchmark, lambda: cases.thread_to_asyncio(make, subscribers, _EVENTS))


@pytest.mark.parametrize("subscribers", [1, 16])
def test_thread_to_asyncio_in_batches(benchmark: BenchmarkFixture, subscribers: int) -> None:
    benchmark.group = f"thread to {subscribers} tasks"
    make = fanouts.tickbus_fanout
    _run(benchmark, lambda: cases.thread_to_asyncio(make, subscribers, _EVENTS, cases.BATCH))


@_each("make", fanouts.THREADED_WAYS)
@_each("latency", {"asyncio": cases.idle_latency, "uvloop": cases.uvloop_latency})
def test_idle_latency(
    benchmark: BenchmarkFixture,
    latency: Callable[[Callable[[int], fanouts.Fanout], int], float],
    make: Callable[[int], fanouts.Fanout],
) -> None:
    benchmark.group = f"idle one-way p50, {latency.__name__}"
    _run(benchmark, lambda: latency(make, 200))


def test_idle_latency_busy_polling(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "idle one-way p50, busy_latency"
    _run(benchmark, lambda: cases.busy_latency(fanouts.tickbus_fanout, 200))


@_each("make", fanouts.WAKING_WAYS)
def test_wake(benchmark: BenchmarkFixture, make: Callable[[int], fanouts.Fanout]) -> None:
    benchmark.group = "wake from a thread"
    _run(benchmark, lambda: cases.wake(make, 200))


@_each("make", fanouts.LOCAL_WAYS)
def test_hop(benchmark: BenchmarkFixture, make: Callable[[int], fanouts.Fanout]) -> None:
    benchmark.group = "hop to a sleeping task"
    _run(benchmark, lambda: cases.hop(make, cases.FILL))


@_each("make", fanouts.LOCAL_WAYS)
def test_fanout_to_sleepers(
    benchmark: BenchmarkFixture, make: Callable[[int], fanouts.Fanout]
) -> None:
    benchmark.group = "publish to 16 sleeping tasks"
    _run(benchmark, lambda: cases.fanout_to_sleepers(make, 16, cases.FILL))


@_each(
    "case",
    {
        "publish": compact.publish_system,
        "publish_priority_queue": compact.publish_priority_queue,
        "publish_batch": compact.publish_array,
        "recv": compact.ready_system,
        "recv_priority_queue": compact.ready_priority_queue,
        "recv_array": compact.recv_array,
        "recv_into": compact.recv_into,
    },
)
def test_compact(benchmark: BenchmarkFixture, case: Callable[[int], float]) -> None:
    benchmark.group = "compact events"
    _run(benchmark, lambda: case(_EVENTS))
