"""The event log: compact events, typed events and objects in a folder, read again in order.

```
append ─► memory ─► file (the system's cache) ─► disk        one process writes
                    └─► read, read_batches                   any number of processes read
```

`tickbus.records` says how objects are stored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from tickbus import _core
from tickbus._core import EventBatch
from tickbus.attach import Attachment, Published, none_attached
from tickbus.errors import ConfigError, StoreError
from tickbus.records import Gap, Record, batches_of, found_by, records_found, records_of

if TYPE_CHECKING:
    from typing import Self

    from tickbus.groups import Group, GroupStats
    from tickbus.replay import Replay

__all__ = [
    "Compression",
    "EventStore",
    "Recovery",
    "Retired",
    "Salvage",
    "SegmentReport",
    "StoreStats",
    "Verification",
    "inspect",
    "salvage",
    "survey",
]

_Path: TypeAlias = str | os.PathLike[str]
_Types: TypeAlias = str | int | Iterable[str | int]

_DEFAULT_SEGMENT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found, and done, when a log was opened.

    Attributes:
        oldest_sequence: The oldest sequence that the log has.
        next_sequence: The sequence that the next record gets.
        segments: Segments that were found.
        scanned_bytes: Bytes that had to be read and checked.
        cut_bytes: Bytes that had been written, but neither synced nor acknowledged, and were cut
            off.
        cut_records: Records in them, as far as they say.
    """

    oldest_sequence: int
    next_sequence: int
    segments: int
    scanned_bytes: int
    cut_bytes: int
    cut_records: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Numbers of a log at one moment.

    Attributes:
        oldest_sequence: The oldest sequence that the log has.
        next_sequence: The sequence that the next record gets.
        durable_sequence: The last sequence up to which all records are durable; `None` if none is.
        segments: Segments, the one that is written included.
        bytes: Bytes in them; opened with `read_only=True`, with what is reserved for the last one.
        held_from: The lowest sequence that consumers of this process still need, for which older
            segments stay; `None` if there is none.
        detached: Buses and systems from which the log has detached itself since it was opened,
            because it had no room or failed.
        missed: Events for which gaps stand that were appended since it was opened, and those that
            the log had taken or were pending when it has detached itself from a bus or a system;
            what was published there later does not count.
        refused: Appends since it was opened that had no room for all that they were given.
        syncs: How often it waited for the disk since it was opened.
        sync_seconds: How long that took.
        poisoned: Whether a write or a sync has failed: nothing is stored until the log is opened
            again.
    """

    oldest_sequence: int
    next_sequence: int
    durable_sequence: int | None
    segments: int
    bytes: int
    held_from: int | None
    detached: int
    missed: int
    refused: int
    syncs: int
    sync_seconds: float
    poisoned: bool


@dataclass(frozen=True, slots=True)
class Compression:
    """What was compressed of a log.

    Attributes:
        segments: Segments.
        bytes_before: Bytes of them before.
        bytes_after: Bytes of them now.
    """

    segments: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Retired:
    """What was removed from the beginning of a log.

    Attributes:
        segments: Segments.
        records: Records in them.
        bytes: Bytes of them.
    """

    segments: int
    records: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Verification:
    """What a log that is sound was found to hold.

    Attributes:
        oldest_sequence: The oldest sequence that the log has.
        next_sequence: The sequence after the last record.
        segments: Segments that were read.
        bytes: Bytes that were read and compared with their checksums.
        torn_bytes: Bytes behind the last record that were never acknowledged; opening the log for
            writing cuts them off.
        indexes: Segments with an index that is what it should be.
        wrong_indexes: Segments with one that is not, which is not used and made again.
    """

    oldest_sequence: int
    next_sequence: int
    segments: int
    bytes: int
    torn_bytes: int
    indexes: int
    wrong_indexes: int


class SegmentReport(NamedTuple):
    """What is in a file of a log, whole or not.

    Attributes:
        name: The file.
        log: The identity of its log, in hexadecimal digits.
        number: Its number in the log, from 0.
        base: The sequence of the first record.
        next_sequence: The sequence after the last record that is whole.
        durable: Records below this sequence were durable, as the file says.
        created: When it was begun, in ns since the Unix epoch, UTC; 0 where its header is damaged.
        bytes: Bytes of the file.
        whole_bytes: Bytes up to the end of the last frame that is whole.
        sealed: Whether it ends with its seal; otherwise it is being written, was torn or is
            damaged.
        frames: Frames of any kind.
        events: Compact events.
        objects: Objects.
        gaps: Notes of events that were lost.
        index_bytes: Bytes of its index; 0 if it has none that fits.
    """

    name: str
    log: str
    number: int
    base: int
    next_sequence: int
    durable: int
    created: int
    bytes: int
    whole_bytes: int
    sealed: bool
    frames: int
    events: int
    objects: int
    gaps: int
    index_bytes: int


@dataclass(frozen=True, slots=True)
class Salvage:
    """What is kept of a log that is damaged, and what is lost.

    Attributes:
        oldest_sequence: The sequence of the first record that there is, or of the gap in its place.
        next_sequence: The sequence after the last one.
        kept: Records that are whole.
        lost: The sequences of records that are not, in order. Those before `oldest_sequence` were
            in files that are missing; each of the others becomes a gap.
        foreign: Files that are left out: they belong to another log, or to a part of this one that
            was given up.
        damaged: Whether something that was acknowledged is not what was written, as
            `EventStore.verify` would tell; no record need be lost by it.
    """

    oldest_sequence: int
    next_sequence: int
    kept: int
    lost: tuple[range, ...]
    foreign: tuple[str, ...]
    damaged: bool


class EventStore(_core.EventStore):
    """A crash-safe log of events and objects in a folder, made by `EventStore.open`.

    One process writes it; any number of readers, in this process or in others, read it meanwhile.
    All methods may be called from any thread. Waiting for the disk releases the global interpreter
    lock. Close it, or use `with`: that makes everything durable.

    Example:
        >>> import tempfile
        >>> from tickbus import Event, EventStore, EventType
        >>> folder = tempfile.TemporaryDirectory()
        >>> with EventStore.open(folder.name) as store:
        ...     store.append(Event(1, EventType.PriceUpdate, symbol="BTCUSDT", value=61_000.0))
        ...     store.append({"note": "hello"}, topic="notes")
        ...     store.append_durable([{"n": 1}, {"n": 2}]).wait()
        ...     for record in store.read(from_sequence=1):
        ...         print(record.sequence, record.topic, record.event)
        0
        1
        3
        1 notes {'note': 'hello'}
        2 None {'n': 1}
        3 None {'n': 2}
        >>> folder.cleanup()
    """

    __slots__ = ()

    def __new__(cls, *_arguments: object, **_named: object) -> Self:
        """Refuses: `open` makes a log, and one of a subclass too."""
        raise TypeError(f"{cls.__name__}() makes no log; use {cls.__name__}.open(path)")

    @classmethod
    def open(
        cls,
        path: _Path,
        *,
        durability: str = "group",
        segment_bytes: int = _DEFAULT_SEGMENT_BYTES,
        max_bytes: int | None = None,
        read_only: bool = False,
    ) -> Self:
        """Opens or creates the log in a folder, after it has recovered what was there.

        Args:
            path: The folder.
            durability: What may be lost, and when an append that nobody waits for is synced.
                `none`: nothing is synced before it is asked for; a crash of the process may lose
                the last second, a power cut everything since the last `sync()`.
                `interval(100)`: a power cut loses what was appended in so many milliseconds.
                `group`: what was acknowledged by `sync()` or a ticket is never lost, and one sync
                serves all that wait; what nobody waits for is synced a millisecond later.
                `always`: each append is durable when it returns.
                `double`: as `always`, and so sure that even a bit that flips in the very last
                commit is known for damage; two syncs each.
            segment_bytes: Bytes of a file of the log, from 64 KiB to 4 GiB; a record that does not
                fit makes it longer.
            max_bytes: The most bytes of all segments, at least those of two; `None` is no limit.
            read_only: Only read, also while another process writes it: up to what is durable, as
                far as the log says so. The other arguments mean nothing then.

        Raises:
            Corrupt: Something that was acknowledged is damaged; nothing was changed.
            AlreadyOpen: Another process writes the log, or another `EventStore` of this one.
            ReadOnly: The system does not let it be written; `read_only=True` reads it.
            VersionError: It was written in a format that this version does not know.
            ConfigError: An argument is out of range.
            StoreError: `read_only` was given, and the folder holds no log.
            StoreIO: The system refused something; `errno` says why.
        """
        name, interval = _durability(durability)
        if read_only:
            _check_log(path)
        return super().__new__(
            cls, os.fspath(path), name, interval, segment_bytes, max_bytes, read_only
        )

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def recovery(self) -> Recovery:
        """What was found, and done, when it was opened; a reader only finds."""
        return Recovery(*self._recovery)

    def read(self, from_sequence: int = 0) -> Iterator[Record]:
        """Returns an iterator of the records from a sequence on, in order.

        It ends with what was appended, or with `read_only=True` what was durable, when it gets
        there; read again from the next sequence for what comes later. Where events are missing, it
        gives a record with a `Gap`: one that was noted by `append_gap`, or one that stands for all
        records that the log no longer has.

        Args:
            from_sequence: The first sequence, at least 0.

        Raises:
            Corrupt: Something is not what was written; nothing is stepped over.
            ConfigError: A name in the log contradicts one of this process, or `from_sequence` is
                out of range.
            StoreIO, Closed: It cannot be read, or is closed.
        """
        return records_of(self.read_batches(from_sequence))

    def read_batches(
        self, from_sequence: int = 0
    ) -> Iterator[tuple[int, EventBatch | list[Record] | Gap]]:
        """Returns an iterator of the records from a sequence on, some thousands at once.

        As `read`, but each item is a sequence and the records from there on: compact events as an
        `EventBatch`, which has those of frames that follow one another until there are 4,096 of
        them or more, objects as a list of records, or a gap. Damage is told after what stands
        before it.

        Args:
            from_sequence: The first sequence, at least 0.

        Raises:
            Corrupt, ConfigError, StoreIO, Closed: As `read`.
        """
        return batches_of(self._reader(from_sequence))

    def replay(self, *, clock: _core.VirtualClock | None = None) -> Replay:
        """Returns a replay of what the log has when it begins: `store.replay().into(bus)`.

        Args:
            clock: As that of `Replay`.
        """
        from tickbus.replay import Replay

        return Replay(self, clock=clock)

    def group(
        self,
        name: str,
        *,
        start: str | int = "oldest",
        lease: float = 30.0,
        max_idle: float | None = 7 * 24 * 3600.0,
        max_in_flight: int = 65_536,
    ) -> Group:
        """Returns a consumer of a group, registered durably if nobody has registered it before.

        The consumers of a group share the records, read up to what is durable: each record goes to
        one of them, and again to one of them until one has committed it. What a group has not done
        stays in the log.

        Args:
            name: Its name, at most 255 bytes.
            start: Where it begins if it is new: with the `oldest` record, with the `newest`, which
                becomes durable from now on, or with that of a sequence.
            lease: How long a consumer may have records before another one gets them, in seconds.
            max_idle: After so many seconds without a consumer it expires: the log may lose what
                it has not read, which it is told by `Lagged` when it returns. `None` is never.
            max_in_flight: The most records that its consumers have at a time.

        Lease and limit of a group are those that were given last.

        Raises:
            ConfigError: An argument is out of range.
            StoreFull, Poisoned, StoreIO, ReadOnly, Closed: As `append`.
            Corrupt: What says how far groups are is damaged.
        """
        from tickbus.groups import Group

        return Group(self, name, start, lease, max_idle, max_in_flight)

    def groups(self) -> list[GroupStats]:
        """Returns the numbers of all groups, also of those without a consumer in this process.

        Raises:
            StoreIO, ReadOnly, Closed: As `append`.
        """
        from tickbus.groups import GroupStats

        return [GroupStats(*row) for row in _core._group_stats(self)]

    def remove_group(self, name: str) -> bool:
        """Forgets a group durably, and returns whether there was one.

        Its consumers get `Closed`, and the log may lose what it has not read.

        Raises:
            StoreFull, Poisoned, StoreIO, ReadOnly, Closed: As `append`.
        """
        return _core._remove_group(self, name)

    def stats(self) -> StoreStats:
        """Returns the numbers of this moment; with `read_only=True`, what the log says of itself.

        Raises:
            Corrupt, StoreIO: As `open`, of a log that another process writes.
        """
        oldest, following, durable_end, segments, size, held_from, since = self._stats()
        durable = durable_end - 1 if durable_end else None
        return StoreStats(oldest, following, durable, segments, size, held_from, *since)

    def retain(
        self, size: int | None = None, count: int | None = None, age: float | None = None
    ) -> Retired:
        """Retires the oldest segments, whole ones only, and returns what that was.

        What was asked for is kept at least; of what is given, any one is reason enough to retire a
        segment, and nothing that a consumer has not committed is retired. The last segment with
        records stays, and so do segments that are not durable. A reader that is behind gets a
        `Gap`.

        Args:
            size: So many of the last bytes are kept.
            count: So many of the last records are kept.
            age: What was written in the last `age` seconds is kept, by the wall clock.

        Raises:
            ConfigError: A number is out of range.
            StoreIO, Poisoned: The folder cannot be changed.
            ReadOnly, Closed: As `append`.
        """
        return Retired(*self._retain(size, count, age))

    def compress(self, older_than: float = 0.0) -> Compression:
        """Compresses what nothing is appended to any more, and returns what that was.

        Everything reads as before. The files are in the seekable format of zstd, which `zstd -d`
        knows. What was compressed is read again and compared before the original is removed. The
        segment that is written is left alone; `seal` finishes it.

        Args:
            older_than: Only segments that were finished so many seconds ago, by the wall clock.

        Raises:
            ConfigError: The time is negative or not finite.
            Corrupt: A segment is damaged; it stays as it is.
            StoreFull, StoreIO, Poisoned: It cannot be written.
            ReadOnly, Closed: As `append`.
        """
        return Compression(*self._compress(older_than))

    def query(
        self,
        start: int | None = None,
        stop: int | None = None,
        types: _Types | None = None,
        symbols: str | int | Iterable[str | int] | None = None,
    ) -> Iterator[Record]:
        """Returns an iterator of the records that meet each argument that is given, by any item.

        They come in the order of the log, whatever their timestamps are. Gaps have no timestamp and
        are left out. An index says which parts of the log need not be read; it is made when it is
        first asked for.

        Args:
            start: The lowest timestamp, in ns since the Unix epoch, UTC.
            stop: The timestamp before which they are.
            types: Event types, by name or code. Objects have none, so that this leaves them out.
            symbols: Symbols, by name or number. Objects have none either.

        Raises:
            ConfigError: An argument has no items, or is out of range; otherwise as `read`.
            Corrupt, StoreIO, Closed: As `read`.
        """
        return records_found(self.query_batches(start, stop, types, symbols))

    def query_batches(
        self,
        start: int | None = None,
        stop: int | None = None,
        types: _Types | None = None,
        symbols: str | int | Iterable[str | int] | None = None,
    ) -> Iterator[tuple[memoryview, EventBatch] | list[Record]]:
        """As `query`, but each item is what was found together: a list of objects, or events.

        Events are a pair: their sequences, a `memoryview` of shape (n,) and format `Q`, which
        `numpy.asarray` takes as `uint64`, and an `EventBatch` of n events.

        Args:
            start: As for `query`.
            stop: As for `query`.
            types: As for `query`.
            symbols: As for `query`.

        Raises:
            ConfigError, Corrupt, StoreIO, Closed: As `query`.
        """
        return found_by(self._query(start, stop, types, symbols))

    def attach(
        self, source: Published, *, on_detach: Callable[[Exception], object] | None = None
    ) -> Attachment:
        """Appends what a bus or a system publishes from now on, until one of them is closed.

        It is a subscription with the policy `block` where the source keeps that, so that publishers
        wait for the log as long as they wait for anybody. What it misses all the same is a gap in
        the log, and so is an event of a bus that msgspec cannot encode or that is too large.

        Compact events of an `EventSystem` are appended by a thread that never takes the global
        interpreter lock. What a bus publishes, whatever `append` takes, is encoded in batches by a
        Python thread, and stored with the topic that it was published on; a compact event has one
        of its own.

        A log that has no room or fails detaches itself, so that no publisher waits for it; it
        counts that in `stats().detached` and tells `on_detach`.

        Args:
            source: An `EventSystem`, an `EventBus` or a `TypedEventBus`.
            on_detach: Called with the error when the log has detached itself, on a thread of its
                own. It may close the log.

        Raises:
            TypeError: The source is something else, or `on_detach` cannot be called.
            ReadOnly, Poisoned, Closed: The log takes nothing, also while another thread closes it,
                or the source is closed.
        """
        return Attachment(self, source, on_detach)

    def close(self) -> None:
        """Stores what attached sources hold, makes everything durable and ends the log.

        Again does nothing.

        Raises:
            Poisoned, StoreIO: As `sync`; it is closed all the same.
        """
        with none_attached(self):
            super().close()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        with none_attached(self):
            super().__exit__(exc_type, exc_value, traceback)

    def verify(self: EventStore | _Path) -> Verification:
        """Reads all of a log and compares it with its checksums; it may be written meanwhile.

        Both `store.verify()` and `EventStore.verify(path)` do.

        Raises:
            Corrupt: The first place that is damaged.
            VersionError: It was written in a format that this version does not know.
            StoreError: The folder holds no log.
            StoreIO: It cannot be read.
        """
        if isinstance(self, EventStore):
            self._flush()
            path: _Path = self.path
        else:
            path = self
        _check_log(path)
        return Verification(*_core._verify_store(os.fspath(path)))


def inspect(path: _Path) -> list[SegmentReport]:
    """Reads all of a log and returns what is in each of its files, in order.

    Raises:
        VersionError: It was written in a format that this version does not know.
        Corrupt: A file has the name of another one.
        StoreError: The folder holds no log.
        StoreIO: It cannot be read.
    """
    _check_log(path)
    return [SegmentReport(*row) for row in _core._inspect_store(os.fspath(path))]


def survey(path: _Path) -> Salvage:
    """Returns what `salvage` would keep of a damaged log, and what is lost; nothing is changed.

    Raises:
        AlreadyOpen: It is being written.
        VersionError: It was written in a format that this version does not know.
        ConfigError: A name in the log contradicts one of this process.
        StoreError: The folder holds no log.
        StoreIO: It cannot be read.
    """
    _check_log(path)
    return _salvage(_core._survey_store(os.fspath(path)))


def salvage(path: _Path, to: _Path) -> Salvage:
    """Writes what is whole of a damaged log into a new folder, and reads it back.

    Every record keeps its sequence, and the log its identity; each record that is lost is a gap in
    its place. The damaged log stays as it is. The new folder is called `<to>.unfinished` until it
    is whole.

    Raises:
        ConfigError: The new folder, or the unfinished one, is there already; otherwise as `survey`.
        StoreFull, StoreIO: The new log cannot be written; nothing is left of it.
        AlreadyOpen, VersionError, StoreError: As `survey`.
    """
    _check_log(path)
    return _salvage(_core._salvage_store(os.fspath(path), os.fspath(to)))


def _salvage(row: _core._SalvageRow) -> Salvage:
    oldest, following, kept, lost, foreign, damaged = row
    ranges = tuple(range(*each) for each in lost)
    return Salvage(oldest, following, kept, ranges, tuple(foreign), damaged)


def _durability(text: object) -> tuple[str, float | None]:
    """Returns a durability's name, and the seconds of an interval."""
    name = text if isinstance(text, str) else ""
    if name in ("none", "group", "always", "double"):
        return name, None
    interval = re.fullmatch(r"interval\((\d+(?:\.\d+)?)\)", name)
    if interval is None:
        raise ConfigError(
            f"durability was {text!r}; it must be 'none', 'interval(100)' with milliseconds, "
            "'group', 'always' or 'double'"
        )
    return "interval", float(interval[1]) / 1_000


def _check_log(path: _Path) -> None:
    """Raises an error if the folder holds nothing of a log."""
    try:
        names = [file.name for file in Path(path).iterdir()]
    except (OSError, ValueError):
        return  # The core says why.
    if not any(map(re.compile(r"LOCK|\d{20}\.elog(\.zst)?").fullmatch, names)):
        raise StoreError(
            f"{os.fspath(path)} holds no log; give the folder that EventStore.open() made"
        )
