"""What the system does to processes with a log: it stops them, and runs out of files."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tickbus
from tickbus import EventStore

_WRITER = """
import sys
import tickbus
with tickbus.EventStore.open(sys.argv[1], segment_bytes=65536, durability="double") as store:
    number = 0
    while True:
        number = store.append_durable(list(range(number, number + 50))).wait() + 1
        print(number, flush=True)
"""


def test_a_writer_that_is_stopped_keeps_nobody_from_reading_and_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, tmp_path], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            acknowledged = int(next(writer.stdout))
            writer.send_signal(signal.SIGSTOP)
            with EventStore.open(tmp_path, read_only=True) as reader:
                events = [record.event for record in reader.read()]
                assert events == list(range(len(events)))
                assert len(events) >= acknowledged
                assert EventStore.verify(tmp_path).next_sequence >= acknowledged
            with pytest.raises(tickbus.AlreadyOpen, match=f"by process {writer.pid}"):
                EventStore.open(tmp_path)
            writer.send_signal(signal.SIGCONT)
        writer.kill()


def test_a_process_without_files_left_is_told_and_loses_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with EventStore.open(tmp_path, segment_bytes=65_536) as store:
        store.append_many(range(10))
        store.sync()
        # Nothing more can be opened: not the next segment, and not the log itself.
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(tickbus.StoreIO, match="Too many open files"):
                store.append_many([bytes(60_000)] * 3)
            with pytest.raises(tickbus.StoreIO, match="Too many open files"):
                EventStore.open(tmp_path / "another")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        stored = store.stats().next_sequence
        assert store.append("it goes on") == stored
    with EventStore.open(tmp_path) as store:
        events = [record.event for record in store.read()]
    assert events[:10] == list(range(10))
    assert events[-1] == "it goes on"
    assert len(events) == stored + 1
