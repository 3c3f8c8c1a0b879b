"""Every error that tickbus raises: one tree, rooted at `BusError`.

The compiled core raises these same classes, so one `except` clause serves both sides.
Messages say what was wanted, what was found and what to do; attributes carry the data.
All of them survive pickling and copying with their attributes.
"""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tickbus._core import Event, _Overflow

__all__ = [
    "AckTimeout",
    "AlreadyOpen",
    "BusError",
    "Closed",
    "ConfigError",
    "Corrupt",
    "CriticalOverflow",
    "ForkedError",
    "Full",
    "Lagged",
    "ParseError",
    "Poisoned",
    "PublishTimeout",
    "ReadOnly",
    "ReceiveTimeout",
    "ReplayRefused",
    "StaleToken",
    "StoreError",
    "StoreFull",
    "StoreIO",
    "SyncTimeout",
    "VersionError",
    "WrongLoop",
]


class BusError(Exception):
    """The root of all errors that tickbus raises on purpose."""


class ConfigError(BusError, ValueError):
    """A setting that the bus cannot keep: a capacity of 0, an unknown backend, a bad pattern."""


if sys.version_info >= (3, 13):  # pragma: no cover - one of two, by version

    class _ClosedBase(BusError, asyncio.QueueShutDown):
        """Lets code written for a shut-down `asyncio.Queue` catch `Closed`."""

else:  # pragma: no cover - the other one

    class _ClosedBase(BusError):
        """Lets code written for a shut-down `asyncio.Queue` catch `Closed`."""


class Closed(_ClosedBase):
    """The bus or the subscription is closed, and what it held has been read; or the log is closed.

    Attributes:
        accepted: Events that were published before the close, when `publish_many` raised this;
            otherwise `None`. Retry with the rest.
    """

    accepted: int | None = None


class ForkedError(Closed):
    """A bus, a subscription or a log was used in a child process after `fork`.

    Open a new one in the child, or start processes with the `spawn` method.
    """


class Full(BusError, asyncio.QueueFull, queue.Full):
    """A subscription whose policy is `reject` has no room; nobody has the event.

    Args:
        message: What was wanted, what was found and what to do.
        subscriptions: The ids of the subscriptions without room.

    Attributes:
        subscriptions: The ids of the subscriptions without room.
        accepted: Events that were published before this one, when `publish_many` raised this;
            otherwise `None`. Retry with the rest.
    """

    accepted: int | None = None

    def __init__(self, message: str = "", subscriptions: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.subscriptions: tuple[int, ...] = tuple(subscriptions)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.subscriptions), self.__dict__


class CriticalOverflow(Full):
    """Some subscriptions had no room for a critical event in time; the others have it.

    Those that miss it are told so by `Lagged`, where it is missing. An event system raises this in
    the publisher, or gives it to the function set by `handle_critical_overflow`.

    Attributes:
        event: The event.
        missing: The ids of the subscriptions that miss it.
        taken: How many subscriptions have it.
        accepted: Events that were published before this one, when `publish_batch` raised this;
            otherwise `None`. Go on with those after this one.
    """

    def __init__(
        self,
        message: str = "",
        missing: Iterable[int] = (),
        taken: int = 0,
        event: Event | None = None,
        left: _Overflow | None = None,
    ) -> None:
        super().__init__(message, missing)
        self.taken = taken
        self.event = event
        self._left = left

    @property
    def missing(self) -> tuple[int, ...]:
        """The ids of the subscriptions that miss the event."""
        return self.subscriptions

    def retry(self, timeout: float | None = None) -> int:
        """Publishes the event again to those that miss it and are still open, and to nobody else.

        On a thread that runs an event loop it does not wait.

        Args:
            timeout: The longest wait for room in seconds; `None` is that of `publish`.

        Returns:
            How many took it.

        Raises:
            CriticalOverflow: Some still have no room.
            Closed: The system is closed.
            ForkedError: This was raised in another process.
        """
        if self._left is None:
            raise ForkedError(
                "this is the copy of an error that another process raised; retry there, or publish "
                "its event here"
            )
        return self._left.retry(timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is left to do stays in the process.
        state = {name: value for name, value in self.__dict__.items() if name != "_left"}
        return type(self), (str(self), self.missing, self.taken, self.event), state


class PublishTimeout(Full, TimeoutError):
    """A subscription whose policy is `reject` had no room in time; nobody has the event."""


class Lagged(BusError):
    """Events were overwritten or refused before this subscription read them.

    It is raised exactly where the hole is: everything received before it precedes the hole and
    everything received after it follows. The subscription stays open; receive again to go on.

    Args:
        missed: How many events the hole holds, at least 1.
        exact: Whether each missed event was one that this subscription wanted. On `broadcast`
            a subscription with a pattern counts every overwritten slot, wanted or not.
        lane: The lane of an event system in which the hole is.

    Attributes:
        missed: How many events the hole holds.
        exact: Whether each of them was wanted here.
        lane: `critical`, `high` or `normal`; `None` on a bus, which has no lanes.
    """

    def __init__(self, missed: int, exact: bool = True, lane: str | None = None) -> None:
        plural = "" if missed == 1 else "s"
        bound = "" if exact else "at most "
        kind, remedy = "", "take a larger capacity or use the policy 'block'"
        if lane is not None:
            kind, remedy = f"{lane} ", f"give the {lane} lane a larger capacity"
        super().__init__(
            f"every event was wanted, but {bound}{missed} {kind}event{plural} went by unread; "
            f"receive again to go on behind the hole, and read faster or {remedy} to avoid holes"
        )
        self.missed = missed
        self.exact = exact
        self.lane = lane

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.missed, self.exact, self.lane), self.__dict__


class ReceiveTimeout(BusError, TimeoutError):
    """No event came within the timeout; the subscription is unchanged."""


class WrongLoop(BusError, RuntimeError):
    """One subscription was awaited from two event loops that are both alive.

    Subscribe once in each loop; every subscription receives every event.
    """


class ParseError(BusError, ValueError):
    """A line of a data file does not have the form that its format promises.

    Args:
        message: What was wanted, what was found and what to do.
        file: The file's name as the user gave it.
        line: The line's number, from 1.
        position: The character within the line, from 1; `None` where the whole line is meant.

    Attributes:
        file: The file's name.
        line: The line's number, from 1.
        position: The character within the line, from 1, or `None`.
    """

    def __init__(self, message: str, file: str, line: int, position: int | None = None) -> None:
        place = f"{file}:{line}" if position is None else f"{file}:{line}:{position}"
        super().__init__(f"{place}: {message}")
        self.message = message
        self.file = file
        self.line = line
        self.position = position

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.message, self.file, self.line, self.position)
        return type(self), arguments, self.__dict__


class ReplayRefused(BusError):
    """A bus or a system is not a replay's alone: a store is attached, or others publish into it.

    Replay into another one, or say `mixed=True`.
    """


class StoreError(BusError):
    """An event log did not do what it was asked for. Nothing that it acknowledged is lost by it.

    Attributes:
        accepted: Events that were stored before, when `append_many` or `append_durable` raised
            this; otherwise `None`. Go on with the rest.
        delivered_live: Consumers of this process that got a risk event all the same, once and
            without a record of it, when `publish_critical` raised this; otherwise `None`.
    """

    accepted: int | None = None
    delivered_live: int | None = None


class Corrupt(StoreError):
    """Something that a log has acknowledged is not what was written; nothing is stepped over.

    Args:
        message: What was wanted, what was found and what to do.
        segment: The file.
        offset: Where in it, in bytes.
        sequence: The first sequence that cannot be read.

    Attributes:
        segment: The file.
        offset: Where in it, in bytes.
        sequence: The first sequence that cannot be read.
    """

    def __init__(self, message: str, segment: str, offset: int, sequence: int) -> None:
        super().__init__(message)
        self.segment = segment
        self.offset = offset
        self.sequence = sequence

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (str(self), self.segment, self.offset, self.sequence)
        return type(self), arguments, self.__dict__


class StoreIO(StoreError, OSError):
    """The system refused something to a log; `errno` says why."""


class Poisoned(StoreError):
    """An earlier write or sync of the log failed, so that nobody knows what is on the disk.

    Open the log again, which recovers all that was acknowledged.
    """


class StoreFull(StoreError):
    """There is no room for more records; what was appended before stays.

    Free space or raise `max_bytes`, and try again.
    """


class ReadOnly(StoreError):
    """The log was opened with `read_only=True`, or the system does not let it be written."""


class AlreadyOpen(StoreError):
    """Another process writes the log, or another `EventStore` of this one; a log has one writer.

    Args:
        message: What was wanted, what was found and what to do.
        process: The process that writes it.

    Attributes:
        process: The process that writes it; `None` if it does not say.
    """

    def __init__(self, message: str, process: int | None = None) -> None:
        super().__init__(message)
        self.process = process


class VersionError(StoreError):
    """The log was written in a format that this version does not know."""


class SyncTimeout(StoreError, TimeoutError):
    """Records were not durable within the timeout. They are stored; wait again."""


class StaleToken(BusError):
    """What was to be acknowledged was delivered again since, or is settled; drop it.

    Raise the lease if consumers need longer than that.
    """


class AckTimeout(BusError, TimeoutError):
    """A risk event was not acknowledged within the timeout. It is still delivered; wait again.

    Args:
        message: What was wanted, what was found and what to do.
        event_id: The event.
        attempts: How often the consumer was given it that was given it most.

    Attributes:
        event_id: The event.
        attempts: How often the consumer was given it that was given it most.
    """

    def __init__(self, message: str, event_id: int, attempts: int) -> None:
        super().__init__(message)
        self.event_id = event_id
        self.attempts = attempts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.event_id, self.attempts), self.__dict__
