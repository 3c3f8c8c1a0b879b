"""Measures what awaiting an event that is there costs, in the three ways of decision 0001.

The ways take turns in rounds of one run; each round compares what was received with what was
published.
"""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import sys
from statistics import median
from time import perf_counter

from ways import HandMade, Way, futures

_EVENTS = 1_024
_ROUNDS = 9


async def _ready(way: Way) -> float:
    recv = way.recv
    seconds = 0.0
    # The first time makes everything warm.
    for is_timed in (False, True):
        for event in range(_EVENTS):
            way.publish(event)
        start = perf_counter()
        received = [await recv() for _ in range(_EVENTS)]
        seconds += (perf_counter() - start) * is_timed
        assert received == list(range(_EVENTS))
    way.close()
    return seconds / _EVENTS


def main() -> None:
    ways = {"hand-made (tickbus)": HandMade, **futures()}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, make in ways.items():
            gc.collect()
            spent[name].append(asyncio.run(_ready(make(_EVENTS))))
    own, *_ = medians = {name: median(seconds) for name, seconds in spent.items()}
    print(
        f"CPython {platform.python_version()}; medians of {_ROUNDS} alternating rounds, "
        "for each event that is there\n"
    )
    print("| awaitable | cost | of the hand-made |")
    print("|---|---:|---:|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e9:.0f} ns | {seconds / medians[own]:.0f}x |")


if __name__ == "__main__":
    main()
    # As in conftest.py.
    sys.stdout.flush()
    os._exit(0)
