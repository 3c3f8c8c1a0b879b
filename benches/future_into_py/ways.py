"""The three ways to `await` an event that decision 0001 compares, behind one surface."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Protocol

import tickbus

_BUILT = Path(__file__).parents[2] / "target/future_into_py"
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_MODULE = "future_into_py_channel"
#: pyo3-asyncio knows CPython up to 3.12.
_NAMES = ("pyo3-async-runtimes", *(["pyo3-asyncio"] if sys.version_info < (3, 13) else []))


class Way(Protocol):
    """A bus with one subscription; its events are integers."""

    def publish(self, event: int) -> int: ...
    def recv(self) -> Awaitable[int]: ...
    def close(self) -> None: ...
    @property
    def pending(self) -> int: ...


class HandMade:
    """tickbus as it is."""

    def __init__(self, capacity: int) -> None:
        bus: tickbus.LockFreeEventBus[int] = tickbus.LockFreeEventBus(capacity)
        self._subscription = bus.subscribe_async()
        self.publish = bus.publish
        self.recv = self._subscription.recv
        self.close = bus.close

    @property
    def pending(self) -> int:
        return self._subscription.pending


def futures() -> dict[str, Callable[[int], Way]]:
    """Returns for each `future_into_py` what makes a way of a capacity."""
    return {name: _channel(_BUILT / name / "release" / f"lib{_MODULE}{_SUFFIX}") for name in _NAMES}


def _channel(path: Path) -> Callable[[int], Way]:
    loader = ExtensionFileLoader(_MODULE, str(path))
    spec = spec_from_loader(_MODULE, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module.Channel
