"""A consumer of risk events that may be killed at any moment, and a database with its effects.

Usage: python risk_consumer.py LOG DATABASE EVENTS

Each event is an order of a number. Its effect, a row, is put into the database in one transaction
with the row that says so, whose key is the event's id; so that an event that is delivered again has
no second effect. Publishes what is missing of EVENTS events, and prints a line after each step, so
that somebody kills it between an effect and its acknowledgment, and `done` at the end.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

from tickbus import CriticalDelivery, EventStore, RiskEventSystem

SCHEMA = """
CREATE TABLE IF NOT EXISTS processed (event INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS effects (number INTEGER, event INTEGER);
"""


def apply(database: sqlite3.Connection, delivery: CriticalDelivery) -> bool:
    """Puts the effect of an event into the database, unless it is there; returns whether it did."""
    with database:
        claim = "INSERT INTO processed VALUES (?) ON CONFLICT DO NOTHING"
        is_new = database.execute(claim, (delivery.event_id,)).rowcount == 1
        if is_new:
            number = delivery.event["number"]
            database.execute("INSERT INTO effects VALUES (?, ?)", (number, delivery.event_id))
    return is_new


def consume(log: Path, path: Path, events: int, tell: Callable[[str], object]) -> None:
    """Publishes what is missing, handles what is delivered, and tells about each step."""
    database = sqlite3.connect(path)
    database.executescript(SCHEMA)
    system_of = {"max_attempts": 512, "retry_base": 0.0, "retry_cap": 0.0, "lease": 600.0}
    with EventStore.open(log) as store, RiskEventSystem(store, **system_of) as risk:
        consumer = risk.register("orders")
        published = [record.event["number"] for record in store.read()]
        for number in range(len(published), events):
            risk.publish_critical({"number": number}, key=f"account {number % 3}")
            tell("published")
        while risk.stats().consumers[0].pending:
            delivery = consumer.take(timeout=60)
            tell("effect" if apply(database, delivery) else "no second effect")
            delivery.ack()
            tell("acknowledged")
    database.close()
    tell("done")


if __name__ == "__main__":
    consume(
        Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), lambda step: print(step, flush=True)
    )
