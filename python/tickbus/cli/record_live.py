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
import traceback
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    contextmanager,
)
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

from tickbus import Attachment, BusError, EventBus, EventStore, EventSystem, StoreError
from tickbus.attach import Published

__all__ = ["LiveProgress", "LiveRecorded", "UnusableError", "find", "is_reference", "record_live"]

is_reference = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*").fullmatch
"""Whether a text is `MODULE:ATTRIBUTE`."""


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
        errors: Tasks that died, and 1 for a context manager that failed.
    """

    sequences: range
    durable: bool
    missed: int
    seconds: float
    failure: Exception | None
    errors: int


def find(reference: str) -> Any:
    """Imports what a reference names; modules in the working directory come first.

    Raises:
        UnusableError: There is no such module or attribute, or it cannot be imported.
    """
    module_name, _, path = reference.partition(":")
    if module_name.endswith(".py"):
        raise UnusableError(f"{module_name} is a file; write the module: {module_name[:-3]}:{path}")
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
    on_attached: Callable[[Callable[[], LiveProgress]], None],
    on_error: Callable[[str], None],
) -> LiveRecorded:
    """Appends what a bus publishes until it is closed, or SIGINT or SIGTERM comes.

    Args:
        reference: What it was found by.
        found: A bus or a system, or what makes one when it is called in the event loop: a function,
            a coroutine function, or one that returns a context manager, which is left at the end.
        store: The log.
        on_attached: Called with what tells any thread how far it is.
        on_error: Called with what a task of the event loop that died, or a context manager that
            is left, has raised.

    Raises:
        UnusableError: It is something else, or fails.
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

    errors = 0

    def died(error: Exception) -> None:
        nonlocal errors
        errors += 1
        on_error(f"{reference} goes on without what failed: {_told(error)}")

    _watch_tasks(died)
    attachment: Attachment | None = None
    try:
        async with AsyncExitStack() as stack:
            source = await _made(reference, found, stack)
            # Whoever publishes once it is attached may also end it.
            with _told_to_end() as told:
                try:
                    attachment = store.attach(source)
                except StoreError:
                    raise
                except BusError as why:
                    raise UnusableError(f"{reference} cannot be recorded: {why}") from why
                try:
                    on_attached(progress)
                    await _ended(attachment, told)
                finally:
                    await asyncio.to_thread(attachment.detach)
    except Exception as why:
        if attachment is None or isinstance(why, StoreError):
            raise
        errors += 1
        on_error(f"{reference} failed: {_told(why)}")
    failure = attachment.failure
    try:
        await asyncio.to_thread(store.sync)
    except BusError as why:
        failure = failure or why
    end = progress()
    sequences = range(before.next_sequence, before.next_sequence + end.records)
    return LiveRecorded(
        sequences, end.durable == end.records, end.missed, end.seconds, failure, errors
    )


async def _made(reference: str, found: Any, stack: AsyncExitStack) -> Published:
    """Returns the bus that something is or makes."""
    try:
        made = found if _is_source(found) or not callable(found) else found()
        if inspect.isawaitable(made):
            made = await made
        if not _is_source(made):
            if isinstance(made, AbstractAsyncContextManager):
                made = await stack.enter_async_context(made)
            elif isinstance(made, AbstractContextManager):
                made = stack.enter_context(made)
    except Exception as why:
        raise UnusableError(f"{reference} failed: {_told(why)}") from why
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


def _told(error: BaseException) -> str:
    """Returns an error in a line: its type, what it says and where it was raised."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_told, error.exceptions))
    words = traceback.format_exception_only(error)[-1].strip().replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{words} ({frames[-1].filename}:{frames[-1].lineno})" if frames else words


def _watch_tasks(on_death: Callable[[Exception], None]) -> None:
    """Tells of each task of this loop that fails while nobody waits for it."""
    loop = asyncio.get_running_loop()

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        task.add_done_callback(lambda task: loop.call_soon(look, task))
        return task

    def look(task: asyncio.Task[Any]) -> None:
        # Whoever waited has taken the error by now; asyncio asks the same when it drops a task.
        if not task.cancelled() and getattr(task, "_log_traceback", True):
            error = task.exception()
            if isinstance(error, Exception):
                on_death(error)

    loop.set_task_factory(make)


@contextmanager
def _told_to_end() -> Iterator[asyncio.Event]:
    """Gives what is set when SIGINT or SIGTERM comes; the second one interrupts what is done then.

    These are handlers of Python, not of the loop, which a task may keep from running.
    """
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    signals = 0

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(told.set)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _ended(attachment: Attachment, told: asyncio.Event) -> None:
    """Returns when the attachment has ended, or somebody says that it should."""
    waiting = {
        asyncio.create_task(told.wait()),
        asyncio.create_task(asyncio.to_thread(attachment.wait)),
    }
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
