"""Recording a live bus into a log, until it is closed or the command is told to end.

```
MODULE:ATTRIBUTE ─► a bus, or a call that makes one ─► EventStore.attach ─► log
                         and lives in this event loop         Ctrl-C ends it ─┘
```
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeGuard

from tickbus import Attachment, BusError, EventBus, EventStore, EventSystem
from tickbus.attach import Published

__all__ = ["LiveProgress", "LiveRecorded", "UnusableError", "find", "is_reference", "record_live"]

is_reference = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*").fullmatch
"""Whether a text is `MODULE:ATTRIBUTE`."""

_TICK_SECONDS = 0.1


class UnusableError(Exception):
    """A reference does not lead to a bus."""


@dataclass(frozen=True, slots=True)
class LiveProgress:
    """How far a recording is.

    Attributes:
        records: Records in the log that were not there before, gaps included.
        durable: Those that no power cut takes any more.
        missed: Events that were lost on the way into the log; gaps stand for them.
        seconds: Since it began.
    """

    records: int
    durable: int
    missed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Records a second."""
        return self.records / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class LiveRecorded:
    """What was recorded.

    Attributes:
        sequences: The records.
        durable: Whether all of them are durable.
        missed: Events that were lost on the way into the log; gaps stand for them.
        seconds: From the beginning to the end.
        failure: Why the log took no more; `None` if it took all.
    """

    sequences: range
    durable: bool
    missed: int
    seconds: float
    failure: Exception | None


def find(reference: str) -> Any:
    """Imports what a reference names; modules in the working directory come first.

    Raises:
        UnusableError: There is no such module or attribute, or it cannot be imported.
    """
    module_name, _, path = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as why:
        if why.name is None or not f"{module_name}.".startswith(f"{why.name}."):
            raise UnusableError(
                f"{module_name} imports {why.name!r}, which is not installed"
            ) from why
        raise UnusableError(
            f"there is no module {why.name!r} in {here} or where Python looks for them"
        ) from why
    except Exception as why:
        raise UnusableError(
            f"{module_name} could not be imported: {type(why).__name__}: {why}"
        ) from why
    try:
        return attrgetter(path)(module)
    except AttributeError as why:
        raise UnusableError(
            f"{module_name} has no {path!r}; give MODULE:ATTRIBUTE of a bus, or of a function that "
            "makes one"
        ) from why


async def record_live(
    reference: str,
    found: object,
    store: EventStore,
    on_progress: Callable[[LiveProgress], None] | None,
) -> LiveRecorded:
    """Appends what a bus publishes until it is closed, or SIGINT or SIGTERM comes.

    Args:
        reference: What it was found by.
        found: A bus or a system, or what makes one when it is called in the event loop: a function,
            a coroutine function, or one that returns a context manager, which is left at the end.
        store: The log.
        on_progress: Called about ten times a second.

    Raises:
        UnusableError: It is something else.
        StoreError: The log cannot be written.
    """
    before = store.stats()
    began = time.perf_counter()

    def progress() -> LiveProgress:
        stats = store.stats()
        first = before.next_sequence
        durable = 0 if stats.durable_sequence is None else stats.durable_sequence + 1 - first
        return LiveProgress(
            stats.next_sequence - first,
            max(durable, 0),
            stats.missed - before.missed,
            time.perf_counter() - began,
        )

    async with AsyncExitStack() as stack:
        source = await _made(reference, found, stack)
        # Whoever publishes once it is attached may also end it.
        told = _told_to_end()
        try:
            attachment = store.attach(source)
        except BusError as why:
            raise UnusableError(f"{reference} cannot be recorded: {why}") from why
        try:
            await _ended(attachment, told, progress, on_progress)
        finally:
            await asyncio.to_thread(attachment.detach)
    failure = attachment.failure
    try:
        await asyncio.to_thread(store.sync)
    except BusError as why:
        failure = failure or why
    end = progress()
    sequences = range(before.next_sequence, before.next_sequence + end.records)
    return LiveRecorded(sequences, end.durable == end.records, end.missed, end.seconds, failure)


async def _made(reference: str, found: Any, stack: AsyncExitStack) -> Published:
    """Returns the bus that something is or makes."""
    made = found if _is_source(found) or not callable(found) else found()
    if inspect.isawaitable(made):
        made = await made
    if not _is_source(made):
        if isinstance(made, AbstractAsyncContextManager):
            made = await stack.enter_async_context(made)
        elif isinstance(made, AbstractContextManager):
            made = stack.enter_context(made)
    if not _is_source(made):
        raise UnusableError(
            f"{reference} gave {made!r}; it must be an EventSystem, an EventBus or a "
            "TypedEventBus, or a function that returns one, a coroutine function and one that "
            "returns a context manager included"
        )
    return made


def _is_source(made: object) -> TypeGuard[Published]:
    return isinstance(made, (EventSystem, EventBus)) or isinstance(
        getattr(made, "bus", None), EventBus
    )


def _told_to_end() -> asyncio.Event:
    """Returns what is set when SIGINT or SIGTERM comes."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()

    def tell() -> None:
        # The next one interrupts whatever is done then.
        loop.remove_signal_handler(signal.SIGINT)
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, tell)
    return told


async def _ended(
    attachment: Attachment,
    told: asyncio.Event,
    progress: Callable[[], LiveProgress],
    on_progress: Callable[[LiveProgress], None] | None,
) -> None:
    """Returns when the attachment has ended, or somebody says that it should."""
    waiting = {
        asyncio.create_task(told.wait()),
        asyncio.create_task(asyncio.to_thread(attachment.wait)),
    }
    try:
        is_over = False
        while not is_over:
            if on_progress is not None:
                on_progress(progress())
            timeout = None if on_progress is None else _TICK_SECONDS
            over, _ = await asyncio.wait(
                waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            is_over = bool(over)
    finally:
        for task in waiting:
            task.cancel()
