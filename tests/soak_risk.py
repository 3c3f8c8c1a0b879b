"""Kills a consumer of risk events between effect and acknowledgment, again and again.

    python tests/soak_risk.py KILLS MINUTES [SEED]

A consumer is a process that opens the log, recovers, publishes what is missing, and handles what is
delivered. After a random number of effects it is killed by SIGKILL: while it waits between the last
one and its acknowledgment, or at a random time. It is forked from a process that has imported
everything and opened nothing, and each core kills the consumers of a log of its own. In the end the
database has to have each effect exactly once. It prints how many kills there were and after which
step of the consumer, and exits with a traceback if an effect is missing or doubled. After so many
minutes it ends with the kills that there were.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "python"))

import tickbus.events  # noqa: F401  # each consumer would import it for the first event it encodes
from risk_consumer import consume

EVENTS = 50
"""Events of a log; with each one a new database begins."""
MOST_EFFECTS = 3
"""Effects that are awaited, at most, before a process is killed."""
HELD = 2 / 3
"""The part of those that wait for that between an effect and its acknowledgment."""
LONGEST = 0.003
"""Seconds in which the others are killed: about as long as a few steps take."""


def start(log: Path, database: Path, last: int | None) -> tuple[int, int]:
    """Forks a consumer, and returns its process and a pipe that has a line for each step of it.

    It waits to be killed after its `last` effect, if that is given.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    effects = itertools.count(1)

    def tell(step: str) -> None:
        os.write(writing, f"{step}\n".encode())
        if "effect" in step and next(effects) == last:
            signal.pause()

    status = 1
    try:
        os.close(reading)
        consume(log, database, EVENTS, tell)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill(log: Path, database: Path, random_numbers: random.Random) -> str:
    """Kills a consumer, and returns what the last thing was that it did; or lets it end."""
    effects = random_numbers.randint(0, MOST_EFFECTS)
    is_held = effects > 0 and random_numbers.random() < HELD
    child, reading = start(log, database, effects if is_held else None)
    steps = ["started"]
    with os.fdopen(reading, encoding="ascii") as pipe:
        while effects and (line := pipe.readline()):
            steps.append(line.strip())
            effects -= "effect" in line
        if not is_held:
            time.sleep(random_numbers.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        steps += pipe.read().split("\n")[:-1]
    _, status = os.waitpid(child, 0)
    # It may have ended before it was killed.
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
    else:
        assert (status, steps[-1]) == (0, "done"), steps
    return steps[-1]


def play(folder: Path, random_numbers: random.Random) -> Counter[str]:
    """Kills the consumers of a log until it has nothing left, and returns after which step each."""
    log, database = folder / "log", folder / "effects.db"
    killed: Counter[str] = Counter()
    while (step := kill(log, database, random_numbers)) != "done":
        killed[step] += 1
    rows = sqlite3.connect(database).execute("SELECT number FROM effects ORDER BY number")
    effects = [number for (number,) in rows]
    assert effects == list(range(EVENTS)), effects
    return killed


def play_many(kills: int, deadline: float, seed: int) -> tuple[Counter[str], int]:
    """Plays logs until consumers were killed so often, and returns how many logs there were."""
    random_numbers = random.Random(seed)
    killed: Counter[str] = Counter()
    logs = 0
    while killed.total() < kills and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            killed += play(Path(folder), random_numbers)
        logs += 1
    return killed, logs


def main(kills: int, minutes: float, seed: int) -> None:
    """Has each core kill its share."""
    print(f"killing consumers of risk events with SEED={seed}", flush=True)
    cores = len(os.sched_getaffinity(0))
    deadline = time.monotonic() + 60 * minutes
    shares = [(-(-kills // cores), deadline, seed + core) for core in range(cores)]
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        played = pool.starmap(play_many, shares, chunksize=1)
    killed = sum((of_core for of_core, _ in played), Counter[str]())
    effects = EVENTS * sum(logs for _, logs in played)
    unacknowledged = killed["effect"] + killed["no second effect"]
    print(
        f"{killed.total()} kills, {unacknowledged} of them between effect and acknowledgment "
        f"({', '.join(f'{count} after {step!r}' for step, count in killed.most_common())}), "
        f"{effects} effects, each exactly once"
    )
    assert killed, f"no consumer was killed within {minutes} minutes; give it more"
    assert unacknowledged > killed.total() // 3, "too few kills were where they matter"


if __name__ == "__main__":
    SEED = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(1 << 32)
    main(int(sys.argv[1]), float(sys.argv[2]), SEED)
