"""What cancelling a wait for an event loses, in the three ways of decision 0001."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable

import pytest
from ways import HandMade, Way, futures

import tickbus

_ENDS = (tickbus.Closed, EOFError)
_EVENTS = 3_000
_LONGEST_SECONDS = 0.0003

_FUTURES = futures()
_EACH_FUTURE = pytest.mark.parametrize("make", _FUTURES.values(), ids=_FUTURES)


@_EACH_FUTURE
def test_a_future_that_took_an_event_loses_it_when_cancelled(make: Callable[[int], Way]) -> None:
    way = make(16)

    async def case() -> None:
        waiting = asyncio.ensure_future(way.recv())
        await asyncio.sleep(0)
        way.publish(7)
        # The loop gets no turn here, and its future no result.
        _wait_until_taken(way)
        assert waiting.cancel()
        way.close()
        with pytest.raises(EOFError):
            await way.recv()

    asyncio.run(case())


def test_a_hand_made_awaitable_takes_nothing_before_its_task_runs() -> None:
    way = HandMade(16)

    async def case() -> None:
        waiting = asyncio.ensure_future(way.recv())
        await asyncio.sleep(0)
        way.publish(7)
        assert way.pending == 1
        assert waiting.cancel()
        assert await way.recv() == 7
        way.close()
        with pytest.raises(tickbus.Closed):
            await way.recv()

    asyncio.run(case())


@_EACH_FUTURE
def test_future_into_py_loses_events_under_random_cancellation(make: Callable[[int], Way]) -> None:
    received, cancelled = asyncio.run(_receive_impatiently(make(_EVENTS), seed=1))
    print(f"{_EVENTS - len(received)} of {_EVENTS} events lost in {cancelled} cancellations")
    assert cancelled > 0
    assert len(received) < _EVENTS


def test_tickbus_loses_no_event_under_random_cancellation() -> None:
    received, cancelled = asyncio.run(_receive_impatiently(HandMade(_EVENTS), seed=1))
    print(f"{_EVENTS - len(received)} of {_EVENTS} events lost in {cancelled} cancellations")
    assert cancelled > 0
    assert received == list(range(_EVENTS))


def _wait_until_taken(way: Way) -> None:
    while way.pending:
        time.sleep(0)


async def _recv_or_cancel(way: Way, patience: float) -> int:
    """As `wait_for`, whose timers are a millisecond coarse; raises `CancelledError`."""
    waiting = asyncio.ensure_future(way.recv())
    deadline = time.perf_counter() + patience
    while not waiting.done() and time.perf_counter() < deadline:  # noqa: ASYNC110 - it is the clock
        await asyncio.sleep(0)
    waiting.cancel()
    return await waiting


async def _receive_impatiently(way: Way, seed: int) -> tuple[list[int], int]:
    """Reads what a thread publishes at random times, and waits for random times for each event.

    Returns:
        What was received until the end, and how often a wait was cancelled.
    """
    chance = random.Random(seed)
    gaps = [chance.uniform(0, _LONGEST_SECONDS) for _ in range(_EVENTS)]

    def produce() -> None:
        for event, gap in enumerate(gaps):
            time.sleep(gap)
            way.publish(event)
        way.close()

    thread = threading.Thread(target=produce)
    thread.start()
    received = []
    cancelled = 0
    while True:
        try:
            received.append(await _recv_or_cancel(way, chance.uniform(0, _LONGEST_SECONDS)))
        except asyncio.CancelledError:
            cancelled += 1
        except _ENDS:
            break
    thread.join()
    return received, cancelled
