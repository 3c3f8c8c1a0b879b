"""Groups: consumers that share a place in an event log, which survives them.

```
 done │ in the hands of consumers │ not read yet │ not durable yet
 ─────┴───────────────────────────┴──────────────┴────────────────► the log
    cursor
```

Each record goes to one consumer of a group, and again to one of them until one has committed it: at
least once. Twice only where a consumer ended, or took longer than its lease.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tickbus import _core
from tickbus.errors import Closed, ForkedError, ReceiveTimeout
from tickbus.records import Gap, Record, batches_of, records_of

if TYPE_CHECKING:
    from tickbus._core import EventBatch
    from tickbus.store import EventStore

__all__ = ["Group", "GroupBatch", "GroupStats"]

_LIMIT = 1_000


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Numbers of a group at one moment.

    Attributes:
        name: Its name.
        cursor: All records below this sequence are done.
        lag: Durable records that are not done.
        in_flight: Records in the hands of consumers.
        redelivered: Records that were given to a consumer again since the log was opened.
        stalled: How often its consumers had as many records as they may, and more were there.
        expirations: How often it has expired and returned since the log was opened.
        expired: Whether it has expired: the log may lose what it has not read.
    """

    name: str
    cursor: int
    lag: int
    in_flight: int
    redelivered: int
    stalled: int
    expirations: int
    expired: bool


class GroupBatch:
    """Records that a consumer has until it commits them, or its lease ends.

    Iterating gives `Record`s; `batches()` gives as many at once as lie together.
    """

    __slots__ = ("_core",)

    def __init__(self, core: _core._GroupBatch) -> None:
        self._core = core

    @property
    def sequences(self) -> range:
        """The sequences of the records."""
        first, end, _ = self._core.lent
        return range(first, end)

    @property
    def attempt(self) -> int:
        """How often they were given to a consumer since the log was opened, from 1."""
        return self._core.lent[2]

    def batches(self) -> Iterator[tuple[int, EventBatch | list[Record] | Gap]]:
        """Returns an iterator of the records, as `EventStore.read_batches` gives them.

        The records are read once: what one iterator has given no other one gives.

        Raises:
            Corrupt, ConfigError, StoreIO: As `EventStore.read`.
        """
        return batches_of(self._core)

    def __iter__(self) -> Iterator[Record]:
        return records_of(self.batches())

    def __len__(self) -> int:
        return len(self.sequences)

    def commit(self) -> None:
        """Says durably that the records are done: nobody gets them again.

        Raises:
            StaleToken: Others have them by now, or they are done.
            StoreFull, Poisoned, StoreIO, Closed: Nobody was told that they are done.
        """
        self._core.commit()

    async def commit_async(self) -> None:
        """As `commit`, without a thread that waits for the disk. Cancelling takes nothing back.

        Raises:
            StaleToken, StoreFull, Poisoned, StoreIO, Closed: As `commit`.
        """
        await self._core.commit_async()

    def give_back(self) -> None:
        """Gives the records back, to be delivered again at once.

        Raises:
            StaleToken: Others have them by now, or they are done.
        """
        self._core.give_back()

    def __repr__(self) -> str:
        return f"<GroupBatch {self.sequences} attempt={self.attempt}>"


class Group:
    """A consumer of a group, made by `EventStore.group`.

    Iterating, also by `async for`, gives `GroupBatch`es until the log is closed; each has to be
    committed. Several threads and tasks may use one, or each one of its own.

    Example:
        >>> import tempfile
        >>> from tickbus import EventStore
        >>> folder = tempfile.TemporaryDirectory()
        >>> with EventStore.open(folder.name) as store:
        ...     audit = store.group("audit")
        ...     _ = store.append_many([{"n": 1}, {"n": 2}])
        ...     store.sync()
        ...     batch = audit.fetch()
        ...     print([record.event for record in batch])
        ...     batch.commit()
        ...     print(audit.stats().cursor, audit.stats().lag)
        [{'n': 1}, {'n': 2}]
        2 0
        >>> folder.cleanup()
    """

    __slots__ = ("_core", "name")

    def __init__(
        self,
        store: EventStore,
        name: str,
        start: str | int,
        lease: float,
        max_idle: float | None,
        max_in_flight: int,
    ) -> None:
        self.name = name
        self._core = _core._Group(store, name, start, lease, max_idle, max_in_flight)

    def fetch(self, limit: int = _LIMIT, timeout: float | None = None) -> GroupBatch:
        """Waits until there are durable records that nobody has, and returns some.

        Args:
            limit: The most records.
            timeout: The longest wait in seconds; `None` waits until the log is closed.

        Raises:
            ReceiveTimeout: There were none in time.
            Lagged: The group had expired, and records are gone that it had not read: `.missed`.
                Fetch again to go on behind them.
            Closed: The log is closed, or the group was removed.
            RuntimeError: The thread runs an event loop.
            StoreFull, Poisoned, StoreIO: A group that had expired could not return.
        """
        batch = self._core.fetch(limit, timeout)
        if batch is None:
            raise ReceiveTimeout(
                f"the group {self.name!r} got no records within {timeout} s; fetch again"
            )
        return GroupBatch(batch)

    def try_fetch(self, limit: int = _LIMIT) -> GroupBatch | None:
        """Returns some records, or `None` if there are none now that nobody has.

        Raises:
            Lagged, Closed, StoreFull, Poisoned, StoreIO: As `fetch`.
        """
        batch = self._core.try_fetch(limit)
        return None if batch is None else GroupBatch(batch)

    async def fetch_async(self, limit: int = _LIMIT) -> GroupBatch:
        """As `fetch`, in a task. Cancelling it loses nothing.

        Raises:
            Lagged, Closed, StoreFull, Poisoned, StoreIO: As `fetch`.
        """
        return GroupBatch(await self._core.fetch_async(limit))

    def stats(self) -> GroupStats:
        """Returns the numbers of this moment.

        Raises:
            Closed: The group was removed.
        """
        return GroupStats(*self._core.stats())

    def __iter__(self) -> Iterator[GroupBatch]:
        while True:
            try:
                batch = self.fetch()
            except ForkedError:
                raise
            except Closed:
                return
            yield batch

    async def __aiter__(self) -> AsyncIterator[GroupBatch]:
        while True:
            try:
                batch = await self.fetch_async()
            except ForkedError:
                raise
            except Closed:
                return
            yield batch

    def __repr__(self) -> str:
        return f"<Group {self.name}>"
