"""Reads a log by batches for each line of its input: what `bench-store` compares with Rust.

Each answer is a line: nanoseconds, events, and the sum of what they carry as metadata.
"""

from __future__ import annotations

import sys
import time

from tickbus import EventBatch, EventStore

for _ in sys.stdin:
    began = time.perf_counter_ns()
    count = metadata = 0
    with EventStore.open(sys.argv[1], read_only=True) as store:
        for _, events in store.read_batches():
            assert isinstance(events, EventBatch), "only events were appended"
            count += len(events)
            metadata += int(events.to_numpy()["metadata"].sum())
    print(time.perf_counter_ns() - began, count, metadata % 2**64, flush=True)
