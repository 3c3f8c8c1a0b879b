"""How an awaitable finishes towards callers that step it by hand, and what stays alive after it.

On CPython 3.12 to 3.14 every `await` finishes by an instance of `StopIteration` that is used again.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import tickbus
from support import RELEASING_BACKENDS, MakeBus, run

releasing = pytest.mark.parametrize("backend", RELEASING_BACKENDS, indirect=True)


class Payload:
    """An event whose end can be seen."""


Waiting = tickbus.AsyncEventSubscription[Any]


def finish(subscription: Waiting) -> StopIteration:
    """Returns what a ready `recv()` raises when it is stepped by `next`."""
    with pytest.raises(StopIteration) as raised:
        next(subscription.recv())  # type: ignore[call-overload]
    return raised.value


def test_an_awaitable_stepped_by_hand_finishes_with_the_event_as_value(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    for event in (1, (2, 3), StopIteration(4)):
        bus.publish(event)
        assert finish(subscription).value is event
        bus.publish(event)
        with pytest.raises(StopIteration) as raised:
            subscription.recv().send(None)
        assert raised.value.value is event


def test_a_stop_iteration_that_somebody_keeps_never_changes(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    kept = []
    for event in range(5):
        bus.publish(event)
        kept.append(finish(subscription))

    async def read() -> list[Any]:
        return [await subscription.recv() for _ in range(5)]

    for event in range(5, 10):
        bus.publish(event)
    assert run(read) == [5, 6, 7, 8, 9]
    assert [stop.value for stop in kept] == [0, 1, 2, 3, 4]


def leave_note(stop: StopIteration, mark: Payload) -> None:
    stop.add_note("seen")
    stop.__notes__.append(mark)


def leave_attribute(stop: StopIteration, mark: Payload) -> None:
    stop.mark = mark  # type: ignore[attr-defined]


def leave_argument(stop: StopIteration, mark: Payload) -> None:
    stop.args = (mark,)


def leave_cause(stop: StopIteration, mark: Payload) -> None:
    stop.__cause__ = ValueError(mark)
    stop.__suppress_context__ = False


def leave_context(stop: StopIteration, mark: Payload) -> None:
    stop.__context__ = ValueError(mark)


def leave_suppression(stop: StopIteration, _mark: Payload) -> None:
    stop.__suppress_context__ = True


def leave_value(stop: StopIteration, mark: Payload) -> None:
    stop.value = mark


@pytest.mark.parametrize(
    "leave",
    [
        leave_note,
        leave_attribute,
        leave_argument,
        leave_cause,
        leave_context,
        leave_suppression,
        leave_value,
    ],
)
def test_what_was_left_in_a_stop_iteration_is_not_in_the_next(
    make_bus: MakeBus, leave: Callable[[StopIteration, Payload], None]
) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    bus.publish(1)
    awaitable = subscription.recv()
    mark = Payload()
    left = weakref.ref(mark)
    try:
        next(awaitable)  # type: ignore[call-overload]
    except StopIteration as stop:
        leave(stop.with_traceback(None), mark)
    del mark
    bus.publish(2)
    again = finish(subscription)  # While the awaitable before is alive, nothing was let go.
    assert left() is None
    assert again.value == 2
    assert again.args in ((), (2,))
    assert vars(again) == {}
    assert again.__cause__ is again.__context__ is None
    assert not again.__suppress_context__


def test_a_stop_iteration_that_was_handled_keeps_no_frame_alive(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    awaitables = []

    def step() -> weakref.ref[Payload]:
        local = Payload()
        bus.publish(1)
        awaitables.append(subscription.recv())
        with contextlib.suppress(StopIteration):
            next(awaitables[-1])
        return weakref.ref(local)

    frame = step()
    bus.publish(2)
    assert len(traceback.extract_tb(finish(subscription).__traceback__)) == 1
    assert frame() is None


@releasing
@pytest.mark.parametrize("method", ["recv", "__anext__"])
def test_an_event_is_freed_when_its_reader_drops_it(make_bus: MakeBus, method: str) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def read() -> None:
        for _ in range(3):
            event = Payload()
            gone = weakref.ref(event)
            bus.publish(event)
            del event
            taken = await getattr(subscription, method)()
            assert taken is gone()
            del taken
            assert gone() is None

    run(read)


@releasing
def test_an_event_is_freed_when_the_awaitable_that_gave_it_is(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()

    async def read() -> None:
        event = Payload()
        gone = weakref.ref(event)
        bus.publish(event)
        awaitable = subscription.recv()
        assert await awaitable is event
        del event, awaitable
        assert gone() is None

    run(read)


@releasing
def test_code_that_runs_when_an_event_ends_may_finish_other_awaitables(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    inner = make_bus()
    inner_subscription = inner.subscribe_async()
    seen = []

    class Reads:
        def __del__(self) -> None:
            inner.publish("inner")
            seen.append(finish(inner_subscription).value)

    async def read() -> None:
        for number in range(3):
            bus.publish(Reads())
            bus.publish(number)
            awaitable = subscription.recv()
            await awaitable  # The event is let go while `awaitable` is alive.
            assert await subscription.recv() == number
            del awaitable

    run(read)
    assert seen == ["inner"] * 3


def test_a_tracer_that_keeps_exceptions_changes_no_event(make_bus: MakeBus) -> None:
    bus = make_bus()
    subscription = bus.subscribe_async()
    kept: list[Any] = []

    def trace(_frame: FrameType, what: str, argument: Any) -> Any:
        if what == "exception":
            kept.append(argument)
        return trace

    async def read() -> list[Any]:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return await read_all()
        finally:
            sys.settrace(before)

    async def read_all() -> list[Any]:
        return [await subscription.recv() for _ in range(8)]

    for event in range(8):
        bus.publish(event)
    assert run(read) == list(range(8))
    # What is traced differs between versions; `read_all` finishes by `StopIteration` too.
    values = [stop.value for _, stop, _ in kept if isinstance(stop, StopIteration)]
    assert [value for value in values if isinstance(value, int)] in ([], list(range(8)))
