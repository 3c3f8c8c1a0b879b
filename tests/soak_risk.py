"""Kills a consumer of risk events between effect and acknowledgment, again and again.

    python tests/soak_risk.py KILLS [SEED]

A consumer is a process that opens the log, recovers, publishes what is missing, and handles what is
delivered; it is killed by SIGKILL after a random number of effects. In the end the database has to
have each effect exactly once. It prints how many kills and effects there were, and exits with a
traceback if an effect is missing or doubled.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "python"))

from test_risk import kill_at

EVENTS = 50
"""Events of a log; with each one a new database begins."""
MOST_EFFECTS = 3
"""Effects of a process, at most, before it is killed."""


def play(folder: Path, kills: int, random_numbers: random.Random) -> int:
    """Kills a consumer of one log at most `kills` times, and returns how often it did."""
    log, database = folder / "log", folder / "effects.db"
    killed = 0
    while killed < kills:
        effect = random_numbers.randrange(MOST_EFFECTS)
        if kill_at(log, database, EVENTS, effect):
            break
        killed += 1
    else:
        kill_at(log, database, EVENTS, None)
    rows = sqlite3.connect(database).execute("SELECT number FROM effects ORDER BY number")
    effects = [number for (number,) in rows]
    assert effects == list(range(EVENTS)), effects
    return killed


def main(kills: int, seed: int) -> None:
    """Plays logs until a consumer was killed so often."""
    print(f"killing consumers of risk events with SEED={seed}", flush=True)
    random_numbers = random.Random(seed)
    killed = logs = 0
    while killed < kills:
        with tempfile.TemporaryDirectory() as folder:
            killed += play(Path(folder), kills - killed, random_numbers)
        logs += 1
    print(f"{killed} kills, {logs * EVENTS} effects, each exactly once")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32))
