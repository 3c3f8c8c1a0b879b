"""The tree of errors: who catches what, what they carry, and that they survive pickling."""

from __future__ import annotations

import asyncio
import copy
import errno
import pickle
import queue
import re
import sys
from pathlib import Path

import pytest

import tickbus

ERRORS = (
    tickbus.BusError("message"),
    tickbus.ConfigError("message"),
    tickbus.Closed("message"),
    tickbus.ForkedError("message"),
    tickbus.Full("message", (1, 2)),
    tickbus.PublishTimeout("message", (3,)),
    tickbus.Lagged(3, True),
    tickbus.Lagged(1, False),
    tickbus.ReceiveTimeout("message"),
    tickbus.WrongLoop("message"),
    tickbus.ParseError("message", "trades.csv", 7, 12),
    tickbus.ParseError("message", "trades.csv", 7),
    tickbus.StoreError("message"),
    tickbus.Corrupt("message", "00000000000000000000.elog", 4_096, 7),
    tickbus.StoreIO(errno.ENOSPC, "message"),
    tickbus.StoreIO("message"),
    tickbus.Poisoned("message"),
    tickbus.StoreFull("message"),
    tickbus.ReadOnly("message"),
    tickbus.AlreadyOpen("message", 7),
    tickbus.VersionError("message"),
    tickbus.SyncTimeout("message"),
)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (tickbus.ConfigError, (ValueError,)),
        (tickbus.Closed, ()),
        (tickbus.ForkedError, (tickbus.Closed,)),
        (tickbus.Full, (asyncio.QueueFull, queue.Full)),
        (tickbus.PublishTimeout, (tickbus.Full, TimeoutError)),
        (tickbus.Lagged, ()),
        (tickbus.ReceiveTimeout, (TimeoutError,)),
        (tickbus.WrongLoop, (RuntimeError,)),
        (tickbus.ParseError, (ValueError,)),
        (tickbus.StoreError, ()),
        (tickbus.Corrupt, (tickbus.StoreError,)),
        (tickbus.StoreIO, (tickbus.StoreError, OSError)),
        (tickbus.Poisoned, (tickbus.StoreError,)),
        (tickbus.StoreFull, (tickbus.StoreError,)),
        (tickbus.ReadOnly, (tickbus.StoreError,)),
        (tickbus.AlreadyOpen, (tickbus.StoreError,)),
        (tickbus.VersionError, (tickbus.StoreError,)),
        (tickbus.SyncTimeout, (tickbus.StoreError, TimeoutError)),
    ],
)
def test_every_error_is_a_bus_error_and_what_its_users_already_catch(
    error: type[tickbus.BusError], bases: tuple[type[Exception], ...]
) -> None:
    for base in (tickbus.BusError, *bases):
        assert issubclass(error, base)


def test_closed_is_a_queue_that_was_shut_down_where_asyncio_has_such() -> None:
    shut_down = getattr(asyncio, "QueueShutDown", tickbus.BusError)
    assert issubclass(tickbus.Closed, shut_down)
    assert (shut_down is tickbus.BusError) == (sys.version_info < (3, 13))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("way", ["pickle", "copy"])
def test_errors_survive_pickling_and_copying(error: tickbus.BusError, way: str) -> None:
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error)) if way == "pickle" else copy.copy(error)
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
    assert vars(again) == vars(error)


def test_full_carries_the_subscriptions_and_what_was_accepted() -> None:
    full = tickbus.Full("message", (1, 2))
    assert (str(full), full.subscriptions, full.accepted) == ("message", (1, 2), None)
    full.accepted = 4
    again: tickbus.Full = pickle.loads(pickle.dumps(full))
    assert (again.subscriptions, again.accepted) == ((1, 2), 4)


def test_a_publish_timeout_is_no_operating_system_error_code() -> None:
    late = tickbus.PublishTimeout("message", (1, 2))
    assert (str(late), late.errno, late.subscriptions) == ("message", None, (1, 2))


def test_closed_carries_what_was_accepted() -> None:
    closed = tickbus.Closed("message")
    assert closed.accepted is None
    closed.accepted = 2
    assert pickle.loads(pickle.dumps(closed)).accepted == 2


def test_lagged_says_how_many_and_whether_all_were_wanted() -> None:
    assert "but 3 events went by" in str(tickbus.Lagged(3, True))
    assert "but at most 1 event went by" in str(tickbus.Lagged(1, False))


def test_a_parse_error_says_where() -> None:
    error = tickbus.ParseError("a price was wanted, 'x' was found", "trades.csv", 7, 12)
    assert str(error) == "trades.csv:7:12: a price was wanted, 'x' was found"
    assert (error.file, error.line, error.position) == ("trades.csv", 7, 12)
    assert str(tickbus.ParseError("empty", "trades.csv", 7)) == "trades.csv:7: empty"


# A text in a line that has spaces in a row between words.
_SPACED = re.compile(r'"[^"\n]*[\w,;:.)}] {2,}[\w({][^"\n]*"')
_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["rust/core", "rust/python", "python"])
def test_no_message_has_spaces_in_a_row(folder: str) -> None:
    texts = {
        file: file.read_text(encoding="utf-8")
        for file in (_ROOT / folder).rglob("*")
        if file.suffix in (".rs", ".py")
    }
    assert texts
    found = [
        f"{file.relative_to(_ROOT)}: {spaced[0]}"
        for file, text in texts.items()
        for spaced in _SPACED.finditer(text)
        if "\\n" not in spaced[0]
    ]
    assert found == []


def test_messages_say_what_was_wanted_found_and_what_to_do() -> None:
    with tickbus.LockFreeEventBus[int](1, tickbus.BackpressureConfig()) as bus:
        subscription = bus.subscribe(policy="reject")
        bus.publish(0)
        with pytest.raises(tickbus.Full) as full:
            bus.publish(1)
        assert str(subscription.id) in str(full.value)
        assert ";" in str(full.value)
        with pytest.raises(tickbus.ConfigError) as wrong:
            bus.subscribe(capacity=0)
        assert str(wrong.value).startswith("capacity was 0; it must be ")
        bus.close()
        with pytest.raises(tickbus.Closed) as closed:
            bus.publish(2)
        assert "closed" in str(closed.value)
