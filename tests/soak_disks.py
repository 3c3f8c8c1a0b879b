"""Disks that are full, read-only or broken, for real: nothing acknowledged is lost.

    python tests/soak_disks.py

It makes a file system of 64 MiB in a file and mounts it, and has `strace` fail calls of the built
package; so it needs root, mkfs.ext4 and strace, and fails without them. It prints one line for each
part.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tickbus import (
    Event,
    EventBatch,
    EventStore,
    EventType,
    ReadOnly,
    StoreFull,
)

DISK_BYTES = 64 * 1024 * 1024
SEGMENT_BYTES = 4 * 1024 * 1024
BATCH = EventBatch([Event(number, EventType.PriceUpdate) for number in range(1_000)])


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """Mounts a new file system of 64 MiB."""
    image, place = folder / "disk", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    place.mkdir()
    run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        run("umount", place)


def fill(store: EventStore) -> int:
    """Appends until there is no room, and returns how many records were acknowledged."""
    acknowledged = 0
    while True:
        try:
            ticket = store.append_durable(BATCH)
            acknowledged = ticket.wait() + 1
        except StoreFull:
            return acknowledged


def check(log: Path, acknowledged: int) -> None:
    """Fails unless a log has the records that were acknowledged."""
    assert EventStore.verify(log).next_sequence >= acknowledged
    with EventStore.open(log, read_only=True) as reader:
        events = [event for _, batch in reader.read_batches() for event in batch]
    assert len(events) >= acknowledged, (len(events), acknowledged)
    for number, event in enumerate(events):
        assert event.timestamp == number % len(BATCH), number


def full_disk(place: Path) -> None:
    log, ballast = place / "log", place / "ballast"
    ballast.write_bytes(bytes(DISK_BYTES // 4))
    with EventStore.open(log, segment_bytes=SEGMENT_BYTES) as store:
        before = fill(store)
        assert before > 0
        check(log, before)
        ballast.unlink()
        after = fill(store)
        assert after > before, "it goes on once there is room"
    check(log, after)
    with EventStore.open(log, segment_bytes=SEGMENT_BYTES) as store:
        assert store.recovery.next_sequence >= after
        retired = store.retain(count=0)
        assert retired.segments > 0
        assert fill(store) > after, "a disk that is full is opened, and given room by retiring"
    print(f"full disk: {before:,} and then {after:,} records acknowledged, all there")


def read_only_disk(place: Path) -> None:
    log = place / "log"
    end = EventStore.verify(log).next_sequence
    run("mount", "-o", "remount,ro", place)
    try:
        EventStore.open(log)
    except ReadOnly as why:
        print(f"read-only disk: {str(why).rsplit(':', 1)[1].strip()}")
    else:
        raise AssertionError("it was opened for writing")
    assert EventStore.verify(log).next_sequence == end
    with EventStore.open(log, read_only=True) as reader:
        assert reader.stats().next_sequence == end
    run("mount", "-o", "remount,rw", place)
    with EventStore.open(log, segment_bytes=SEGMENT_BYTES) as store:
        assert store.recovery.next_sequence == end


WRITER = """
    import sys
    from tickbus import EventStore, Poisoned, StoreError, StoreIO

    store = EventStore.open(sys.argv[1], segment_bytes=65536)
    for number in range(200):
        try:
            sequence = store.append_durable(number).wait()
        except StoreError as why:
            failed = type(why)
            break
        print(sequence, flush=True)
    for call in (lambda: store.append(0), lambda: store.append_durable(0), store.seal):
        try:
            call()
        except Poisoned:
            continue
        raise AssertionError("it goes on")
    print(failed.__name__)
"""


def broken_calls(folder: Path) -> None:
    """Has a call fail in the middle, once: the log is poisoned, and all acknowledged is there."""
    tried = 0
    faults = [("fdatasync", "EIO"), ("pwritev", "ENOSPC"), ("pwritev", "EIO")]
    for call, error in faults:
        for number in (5, 20, 60):
            log = folder / f"{call}-{error}-{number}"
            command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
            command += ["-e", f"inject={call}:error={error}:when={number}"]
            command += [sys.executable, "-c", textwrap.dedent(WRITER), str(log)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, (call, error, number, done.stderr)
            *sequences, failure = done.stdout.split()
            assert failure in {"StoreIO", "Poisoned"}, (call, error, number, failure)
            assert sequences == [str(at) for at in range(len(sequences))]
            with EventStore.open(log) as store:
                numbers = [record.event for record in store.read()]
            assert numbers[: len(sequences)] == list(range(len(sequences)))
            tried += 1
    print(f"broken calls: {tried} logs poisoned, and all that they acknowledged is there")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with mounted(Path(folder)) as place:
            full_disk(place)
            read_only_disk(place)
        broken_calls(Path(folder))


if __name__ == "__main__":
    main()
