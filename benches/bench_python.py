"""The cases of `run.py` under pytest-benchmark, for distributions and comparisons over time.

Run with `pytest benches/bench_python.py`. Each case returns the seconds that one event took
without preparing and checking; that is the time that the table shows.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

_ROUNDS = 5
_EVENTS = 4 * cases.FILL

_SUBSCRIBERS = pytest.mark.parametrize("subscribers", [1, 4, 16])
_WAYS = pytest.mark.parametrize(
    "make",
    [cases.tickbus_fanout, cases.aiologic_fanout, cases.threaded_queue_fanout],
    ids=["tickbus", "aiologic", "call_soon_threadsafe"],
)


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


@_SUBSCRIBERS
@pytest.mark.parametrize(
    "case",
    [cases.publish_tickbus, cases.publish_tickbus_topic, cases.publish_queues],
    ids=["tickbus", "tickbus_topic", "asyncio_queue"],
)
def test_publish(
    benchmark: BenchmarkFixture, case: Callable[[int, int], float], subscribers: int
) -> None:
    benchmark.group = f"publish to {subscribers}"
    _run(benchmark, lambda: case(subscribers, _EVENTS))


@pytest.mark.parametrize(
    "case",
    [cases.ready_recv, cases.ready_recv_many, cases.ready_queue_get],
    ids=["recv", "recv_many", "asyncio_queue_get"],
)
def test_ready(benchmark: BenchmarkFixture, case: Callable[[int], float]) -> None:
    benchmark.group = "ready"
    _run(benchmark, lambda: case(_EVENTS))


@_WAYS
@pytest.mark.parametrize("subscribers", [1, 16])
def test_thread_to_asyncio(
    benchmark: BenchmarkFixture, make: Callable[[int], cases.Fanout], subscribers: int
) -> None:
    benchmark.group = f"thread to {subscribers} tasks"
    _run(benchmark, lambda: cases.thread_to_asyncio(make, subscribers, _EVENTS))


@pytest.mark.parametrize("subscribers", [1, 16])
def test_thread_to_asyncio_in_batches(benchmark: BenchmarkFixture, subscribers: int) -> None:
    benchmark.group = f"thread to {subscribers} tasks"
    make = cases.tickbus_fanout
    _run(benchmark, lambda: cases.thread_to_asyncio(make, subscribers, _EVENTS, cases.BATCH))


@_WAYS
def test_idle_latency(benchmark: BenchmarkFixture, make: Callable[[int], cases.Fanout]) -> None:
    benchmark.group = "idle one-way p50"
    _run(benchmark, lambda: cases.idle_latency(make, 200))
