"""Fixtures of the Python tests: every promise is tested on every backend."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import tickbus
from support import BACKENDS, LOOPS, MakeBus, Subscription

# No test asserts a time, and a busy machine takes any.
settings.register_profile("tickbus", deadline=None)
settings.load_profile("tickbus")

_ROOT = Path(__file__).resolve().parents[2]
_DATA = Path(os.environ.get("TICKBUS_DATA") or _ROOT.parent / "shared" / "data")
_PROMTOOL = shutil.which("promtool") or shutil.which("promtool", path=_ROOT / ".venv" / "bin")
# What tests with a marker cannot do without, whether it is here, and how to have it.
_NEEDS = {
    "real_data": (
        _DATA.is_dir(),
        f"no captures in {_DATA}: set TICKBUS_DATA to the folder that holds them",
    ),
    "promtool": (
        _PROMTOOL is not None,
        "no promtool: run tools/promtool.sh or install the Debian package prometheus",
    ),
}
_left_out = pytest.StashKey[list[str]]()


def pytest_configure() -> None:
    """Has Ctrl+C end children also where the tests run in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend; a test that takes it runs once for each."""
    name: str = request.param
    return name


@pytest.fixture
def producers() -> str:
    """How publishers get past each other on the buses that `make_bus` makes."""
    return "shared"


@pytest.fixture
def make_bus(backend: str, producers: str) -> Iterator[MakeBus]:
    """Makes buses on the backend, with patience 0 unless told otherwise.

    At the end of the test it closes them and what subscribed to them.
    """
    opened: list[tickbus.EventBus[Any] | Subscription] = []

    class ClosingBus(tickbus.EventBus[Any]):
        """Keeps its subscriptions until the test has ended."""

        def subscribe(self, *args: Any, **kwargs: Any) -> tickbus.EventSubscription[Any]:
            opened.append(subscription := super().subscribe(*args, **kwargs))
            return subscription

        def subscribe_async(self, *args: Any, **kwargs: Any) -> tickbus.AsyncEventSubscription[Any]:
            opened.append(subscription := super().subscribe_async(*args, **kwargs))
            return subscription

    def make(
        capacity: int = 16,
        *,
        max_block_duration: float = 0.0,
        drop_oldest: bool = False,
        warn_threshold: int | None = None,
        max_topics: int = 65_536,
        keep_last: str | None = None,
        latency_sampling: int | None = 128,
        clock: tickbus.Clock | None = None,
    ) -> tickbus.EventBus[Any]:
        backpressure = tickbus.BackpressureConfig(drop_oldest, warn_threshold, max_block_duration)
        bus = ClosingBus(
            backend,
            capacity,
            backpressure,
            max_topics=max_topics,
            keep_last=keep_last,
            latency_sampling=latency_sampling,
            producers=producers,
            clock=clock,
        )
        opened.append(bus)
        return bus

    yield make
    for each in opened:
        each.close()


@pytest.fixture(params=LOOPS)
def any_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has `asyncio.run` make one kind of event loop; a test runs once for each."""
    kind: str = request.param
    monkeypatch.setattr(asyncio.events, "new_event_loop", LOOPS[kind])
    if kind == "without_eventfd":
        monkeypatch.setenv("TICKBUS_EVENTFD", "0")
    return kind


@pytest.fixture
def promtool() -> str:
    """The path of promtool."""
    assert _PROMTOOL is not None
    return _PROMTOOL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a log."""
    return tmp_path / "log"


@pytest.fixture
def store(folder: Path) -> Iterator[tickbus.EventStore]:
    """A log that is open for writing, whose segments are soon full."""
    with tickbus.EventStore.open(folder, segment_bytes=64 * 1024) as store:
        yield store


@pytest.fixture
def data() -> Path:
    """The folder of real captures."""
    return _DATA


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lines = config.stash[_left_out] = []
    for marker, (is_here, remedy) in _NEEDS.items():
        needing = [item for item in items if item.get_closest_marker(marker)]
        if is_here or not needing:
            continue
        if os.environ.get("CI") == "true":
            raise pytest.UsageError(f"CI=true, but {remedy}")
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)
        lines.append(f"deselected {len(needing)} tests marked {marker}: {remedy}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash.get(_left_out, []):
        terminalreporter.write_line(line)
