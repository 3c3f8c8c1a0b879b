"""Queries of a log: exactly what reading everything and looking at it would find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tickbus
from tickbus import Event, EventBatch, EventStore, EventType, Gap, Record

SMALL = 64 * 1024
"""Bytes of the smallest segment."""
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", None)
TYPES = (EventType.PriceUpdate, EventType.OrderPlaced, EventType.EmergencyStop)


def event(number: int) -> Event:
    return Event(number, TYPES[number % 3], symbol=SYMBOLS[number % 4], value=number / 2)


def fill(store: EventStore) -> list[Record]:
    """Appends events with rising times, an object after each 1,000 and a gap; returns all of it."""
    for first in range(0, 10_000, 1_000):
        store.append_many([event(number) for number in range(first, first + 1_000)])
        store.append({"after": first}, topic="notes")
    store.append_gap(3)
    return list(store.read())


Choice = dict[str, Any]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, lambda record: True),
        ({"start": 500, "stop": 600}, lambda r: 500 <= r.timestamp < 600),
        ({"start": 9_990}, lambda r: r.timestamp >= 9_990),
        ({"stop": 0}, lambda r: False),
        ({"start": 600, "stop": 500}, lambda r: False),
        (
            {"types": EventType.EmergencyStop},
            lambda r: isinstance(r.event, Event) and r.event.event_type == EventType.EmergencyStop,
        ),
        (
            {"types": ["price_update", EventType.OrderPlaced], "symbols": "ETHUSDT"},
            lambda r: (
                isinstance(r.event, Event)
                and r.event.event_type != EventType.EmergencyStop
                and r.event.symbol == "ETHUSDT"
            ),
        ),
        (
            {"symbols": ["SOLUSDT", "BTCUSDT"], "start": 5_000},
            lambda r: r.timestamp >= 5_000 and r.event.symbol in ("SOLUSDT", "BTCUSDT"),
        ),
        ({"symbols": "NOBODY"}, lambda r: False),
    ],
)
def test_a_query_finds_what_looking_at_everything_finds_also_while_another_writes(
    folder: Path, asked: Choice, wanted: Any
) -> None:
    with EventStore.open(folder, segment_bytes=SMALL) as store:
        everything = fill(store)
        expected = [r for r in everything if not isinstance(r.event, Gap) and wanted(r)]
        assert list(store.query(**asked)) == expected
        store.sync()
        store.seal()
        with EventStore.open(folder, read_only=True) as reader:
            assert list(reader.query(**asked)) == expected
        # The index that was made goes on with what comes later.
        store.append_many([event(number) for number in range(20_000, 20_100)])
        later = [r for r in store.read(len(everything)) if wanted(r)]
        assert list(store.query(**asked)) == expected + later


@settings(max_examples=25)
@given(
    times=st.lists(st.integers(0, 50), max_size=200),
    start=st.integers(0, 50),
    stop=st.integers(0, 60),
)
def test_times_may_be_in_any_order_in_the_log(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], start: int, stop: int
) -> None:
    with EventStore.open(tmp_path_factory.mktemp("log"), segment_bytes=SMALL) as store:
        for first in range(0, len(times), 7):
            store.append_many([Event(time, 1) for time in times[first : first + 7]])
        found = [(r.sequence, r.timestamp) for r in store.query(start, stop)]
    assert found == [(n, time) for n, time in enumerate(times) if start <= time < stop]


def test_batches_are_numpy_s_with_the_sequence_of_each_event(store: EventStore) -> None:
    fill(store)
    batches = list(store.query_batches(start=1_500, symbols=["ETHUSDT"]))
    pairs = [found for found in batches if isinstance(found, tuple)]
    assert len(pairs) == len(batches) > 1
    sequences = np.concatenate([np.asarray(sequences) for sequences, _ in pairs])
    assert sequences.dtype == np.uint64
    events = np.concatenate([events.to_numpy() for _, events in pairs])
    numbers = np.arange(1_501, 10_000, 4)
    assert (events["timestamp"] == numbers).all()
    # One object stands before each further thousand.
    assert (sequences == numbers + numbers // 1_000).all()
    objects = [found for found in store.query_batches(stop=1) if isinstance(found, list)]
    assert [record.event for found in objects for record in found] == [
        {"after": first} for first in range(0, 10_000, 1_000)
    ]
    assert all(isinstance(events, EventBatch) for _, events in pairs)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"start": -1}, "start was -1; it must be a whole number from 0 to 18"),
        ({"stop": 1 << 64}, "stop was 18446744073709551616; it must be a whole number"),
        ({"start": 1.5}, "start was 1.5"),
        ({"types": []}, "types had no items"),
        ({"types": "nothing_of_ours"}, "nothing_of_ours"),
        ({"symbols": []}, "symbols had no items"),
    ],
)
def test_what_cannot_be_asked_for_is_a_config_error_at_once(
    store: EventStore, asked: Choice, told: str
) -> None:
    with pytest.raises(tickbus.ConfigError, match=told):
        store.query(**asked)


def test_a_closed_log_is_not_queried(folder: Path) -> None:
    with EventStore.open(folder) as store:
        store.append(1)
    with pytest.raises(tickbus.Closed):
        store.query()


def test_damage_is_told_and_never_stepped_over(folder: Path) -> None:
    with EventStore.open(folder) as store:
        store.append_many([event(number) for number in range(10_000)])
    [segment] = folder.glob("*.elog")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with (
        EventStore.open(folder, read_only=True) as reader,
        pytest.raises(tickbus.Corrupt, match=r"is damaged at byte \d+"),
    ):
        list(reader.query())
