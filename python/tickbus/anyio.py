"""Reading a subscription as an `anyio` stream, on asyncio and on trio.

```python
async with EventReceiveStream(bus.subscribe_async("trades.*")) as stream:
    async for event in stream:
        ...
```

No thread waits: on trio the publisher reschedules the reading task through the run's token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

try:
    import anyio
    from anyio.abc import ObjectReceiveStream
    from anyio.lowlevel import checkpoint_if_cancelled
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "tickbus.anyio needs anyio; install it with: pip install 'tickbus[anyio]'",
        name=_missing.name,
    ) from _missing

from tickbus.errors import Closed, ForkedError

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Protocol

    import trio

    from tickbus._core import Wakeup

    class _ReadByTasks(Protocol[_T_co]):
        """What `subscribe_async` of a bus or of an event system returns."""

        @property
        def id(self) -> int: ...
        @property
        def pending(self) -> int: ...
        @property
        def closed(self) -> bool: ...
        def recv(self) -> Coroutine[object, None, _T_co]: ...
        def try_recv(self) -> _T_co | None: ...
        def close(self) -> None: ...
        def _join(self, event_loop: object) -> Wakeup | None: ...
        def _leave(self, wakeup: Wakeup) -> None: ...


__all__ = ["EventReceiveStream"]


class EventReceiveStream(ObjectReceiveStream[_T], Generic[_T]):
    """Receives the events of a subscription; closing it closes the subscription.

    `receive` raises `tickbus.Lagged` where events are missing: receive again to go on. Several
    tasks may receive: each event goes to exactly one of them. Cancelling loses nothing. The
    subscription must not be read elsewhere in another event loop at the same time.

    Args:
        subscription: What `subscribe_async` of a bus or of an event system returned.
    """

    def __init__(self, subscription: _ReadByTasks[_T]) -> None:
        self._subscription = subscription
        self._closed = False
        self._trio: _TrioReader | None = None

    async def receive(self) -> _T:
        """Waits for the next event.

        Raises:
            Lagged: Events are missing here; receive again to go on.
            anyio.EndOfStream: The bus was closed and everything was read.
            anyio.ClosedResourceError: The stream was closed.
            WrongLoop: Another live loop waits for the subscription.
        """
        await checkpoint_if_cancelled()
        if self._closed:
            raise anyio.ClosedResourceError
        try:
            if not _in_trio_run():
                return await self._subscription.recv()
            if self._trio is None or not self._trio.is_in_its_run():
                self._trio = _TrioReader()
            return await self._trio.recv(self._subscription)
        except ForkedError:
            raise
        except Closed as end:
            if self._closed:
                raise anyio.ClosedResourceError from end
            raise anyio.EndOfStream from end

    async def aclose(self) -> None:
        """Closes the subscription; what is pending there is counted as `closed`."""
        self._closed = True
        self._subscription.close()
        await checkpoint_if_cancelled()

    @property
    def subscription(self) -> _ReadByTasks[_T]:
        """The subscription that is read."""
        return self._subscription


def _in_trio_run() -> bool:
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


class _TrioLoop:
    """A run of trio, as far as a subscription needs a loop: to be called back in it."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._call = token.run_sync_soon

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return False

    def add_reader(self, descriptor: int, callback: Callable[[], object]) -> None:
        raise NotImplementedError

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, **_: Any) -> None:
        self._call(callback, *args)

    call_soon = call_soon_threadsafe


#: Ready events in a row after which other tasks of the run get a turn.
_READY_IN_A_ROW = 256


class _TrioReader:
    """Waits for a subscription inside one run of trio."""

    def __init__(self) -> None:
        import trio

        self._token = trio.lowlevel.current_trio_token()
        self._loop = _TrioLoop(self._token)
        self._ready_in_a_row = 0

    def is_in_its_run(self) -> bool:
        import trio

        return trio.lowlevel.current_trio_token() is self._token

    async def recv(self, subscription: _ReadByTasks[_T]) -> _T:
        import trio

        while True:
            if self._ready_in_a_row == _READY_IN_A_ROW:
                self._ready_in_a_row = 0
                await trio.lowlevel.cancel_shielded_checkpoint()
            event = subscription.try_recv()
            if event is not None:
                self._ready_in_a_row += 1
                return event
            self._ready_in_a_row = 0
            wakeup = subscription._join(self._loop)
            if wakeup is not None:
                try:
                    await _woken(wakeup)
                finally:
                    subscription._leave(wakeup)


async def _woken(wakeup: Wakeup) -> None:
    """Suspends the task until the wake-up comes."""
    import trio

    task = trio.lowlevel.current_task()
    waiting = True

    def wake(_wakeup: object) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            trio.lowlevel.reschedule(task)

    def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
        nonlocal waiting
        waiting = False
        return trio.lowlevel.Abort.SUCCEEDED

    wakeup.add_done_callback(wake)
    await trio.lowlevel.wait_task_rescheduled(abort)
