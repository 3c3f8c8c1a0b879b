"""Python code that runs in awkward moments: destructors, callbacks, and hostile payloads."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tickbus
from support import RELEASING_BACKENDS, MakeBus, assert_sums_closed, read_all, run

lock_free = pytest.mark.parametrize("backend", ["lock_free"], indirect=True)
releasing = pytest.mark.parametrize("backend", RELEASING_BACKENDS, indirect=True)

Act = Callable[[tickbus.EventBus[Any], tickbus.EventSubscription[Any]], object]

ACTS: dict[str, Act] = {
    "publish": lambda bus, subscription: bus.publish("from within"),
    "publish_many": lambda bus, subscription: bus.publish_many(["from within"] * 3),
    "recv": lambda bus, subscription: subscription.try_recv(),
    "close_the_subscription": lambda bus, subscription: subscription.close(),
    "close_the_bus": lambda bus, subscription: bus.close(),
    "subscribe": lambda bus, subscription: bus.subscribe().close(),
    "metrics": lambda bus, subscription: bus.metrics(),
    "explain": lambda bus, subscription: bus.explain(),
    "collect": lambda bus, subscription: gc.collect(),
}
acts = pytest.mark.parametrize("act", ACTS)

TRIGGERS: dict[str, Act] = {
    "overwriting": lambda bus, subscription: bus.publish_many(["over"] * 4),
    "receiving": lambda bus, subscription: read_all(subscription),
    "receiving_a_batch": lambda bus, subscription: subscription.recv_many(4),
    "closing_the_subscription": lambda bus, subscription: subscription.close(),
    "publishing_to_nobody": lambda bus, subscription: bus.publish(
        _Watched.another(), "nobody.wants"
    ),
}
triggers = pytest.mark.parametrize("trigger", TRIGGERS)


class _Watched:
    """Acts when it ends."""

    on_end: Callable[[], object] | None = None
    ended = 0

    @staticmethod
    def another() -> _Watched:
        return _Watched()

    def __del__(self) -> None:
        act = type(self).on_end
        type(self).ended += 1
        if act is not None:
            with contextlib.suppress(tickbus.Closed, tickbus.Full):
                act()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    _Watched.on_end = None
    _Watched.ended = 0


@releasing
@acts
@triggers
def test_a_destructor_may_use_the_bus_that_drops_it(
    make_bus: MakeBus, act: str, trigger: str
) -> None:
    bus = make_bus(4, drop_oldest=True)
    subscription = bus.subscribe(on_lag="count")
    bus.publish_many(_Watched() for _ in range(4))
    _Watched.on_end = lambda: ACTS[act](bus, subscription)
    with contextlib.suppress(tickbus.Closed):
        TRIGGERS[trigger](bus, subscription)
    assert _Watched.ended > 0
    _Watched.on_end = None
    assert_sums_closed(bus)


@releasing
@acts
@triggers
def test_a_weakref_callback_may_use_the_bus_that_drops_its_object(
    make_bus: MakeBus, act: str, trigger: str
) -> None:
    bus = make_bus(4, drop_oldest=True)
    subscription = bus.subscribe(on_lag="count")
    called = 0

    def callback(_: object) -> None:
        nonlocal called
        called += 1
        with contextlib.suppress(tickbus.Closed, tickbus.Full):
            ACTS[act](bus, subscription)

    events = [_Watched() for _ in range(4)]
    references = [weakref.ref(event, callback) for event in events]
    bus.publish_many(events)
    events.clear()
    if trigger == "publishing_to_nobody":
        event = _Watched()
        references.append(weakref.ref(event, callback))
        del event
    with contextlib.suppress(tickbus.Closed):
        TRIGGERS[trigger](bus, subscription)
    assert called > 0
    assert_sums_closed(bus)


@acts
@pytest.mark.parametrize("policy", ["reject", "drop_newest", "block"])
@lock_free
def test_a_destructor_of_a_refused_event_may_use_the_bus(
    make_bus: MakeBus, act: str, policy: str
) -> None:
    bus = make_bus(1)
    subscription = bus.subscribe(policy=policy, on_lag="count")
    bus.publish("first")
    _Watched.on_end = lambda: ACTS[act](bus, subscription)
    try:
        bus.publish(_Watched())
    except tickbus.Full:
        assert policy == "reject"
    gc.collect()
    assert _Watched.ended == 1
    _Watched.on_end = None
    assert_sums_closed(bus)


@acts
def test_a_topic_of_a_subclass_of_str_is_its_text_whatever_it_does(
    make_bus: MakeBus, act: str
) -> None:
    bus = make_bus(8, drop_oldest=True)
    subscription = bus.subscribe("trades.*", on_lag="count")
    calls = 0

    class Name(str):
        def _misbehave(self, *_: object) -> Any:
            nonlocal calls
            calls += 1
            ACTS[act](bus, subscription)
            raise LookupError

        __hash__ = __eq__ = __str__ = __len__ = _misbehave
        __getattribute__ = _misbehave  # type: ignore[assignment]

    for _ in range(3):
        assert bus.publish("event", Name("trades.BTCUSDT")) == 1
    assert bus.publish("event", Name("orders.BTCUSDT")) == 0
    assert bus.publish("event", "trades.BTCUSDT") == 1
    assert calls == 0
    assert read_all(subscription) == ["event"] * 4
    assert_sums_closed(bus)


class _Meta(type):
    """A class of classes that answers nothing truthfully."""

    def __instancecheck__(cls, instance: object) -> bool:
        raise LookupError("instancecheck")

    def __subclasscheck__(cls, subclass: type) -> bool:
        raise LookupError("subclasscheck")

    def __getattribute__(cls, name: str) -> Any:
        raise LookupError(name)

    def __hash__(cls) -> int:
        raise LookupError("hash")

    def __eq__(cls, other: object) -> bool:
        raise LookupError("eq")


def _hostile() -> object:
    """Returns an object that raises whatever is asked of it."""

    def refuse(self: object, *_: object) -> Any:
        raise LookupError

    class Hostile(metaclass=_Meta):
        __eq__ = __hash__ = __repr__ = __str__ = __bool__ = __len__ = __iter__ = refuse
        __getattribute__ = __setattr__ = __call__ = __index__ = __await__ = __format__ = refuse
        __class__ = property(refuse)  # type: ignore[assignment]

    return Hostile()


def test_hostile_payloads_are_carried_and_harm_nobody(make_bus: MakeBus) -> None:
    bus = make_bus(4, drop_oldest=True)
    subscription, tasks = bus.subscribe(), bus.subscribe_async()
    hostile = _hostile()
    assert bus.publish(hostile) == 2
    assert bus.publish_many([hostile]) == 1
    assert bus.publish(hostile, "topic") == 2
    assert "pending=3" in repr(subscription)
    assert subscription.recv() is hostile
    first, second = subscription.recv_many(4)
    assert first is hostile
    assert second is hostile

    async def read() -> None:
        assert await bus.publish_async(hostile) == 2
        assert await tasks.recv() is hostile
        assert all(event is hostile for event in await tasks.recv_many(4))

    run(read)
    bus.publish("good")
    assert subscription.recv() is hostile
    assert subscription.recv() == "good"
    assert_sums_closed(bus)


@lock_free
def test_a_hostile_payload_that_is_refused_does_not_spoil_the_error(make_bus: MakeBus) -> None:
    bus = make_bus(1)
    subscription = bus.subscribe(policy="reject")
    bus.publish("first")
    for publish in (bus.publish, lambda event: bus.publish_timeout(event, 0.0)):
        with pytest.raises(tickbus.Full) as caught:
            publish(_hostile())
        assert caught.value.subscriptions == (subscription.id,)
        assert str(subscription.id) in str(caught.value)


@releasing
def test_a_destructor_that_raises_harms_only_itself(
    make_bus: MakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: raised.append(str(hook.exc_value)))

    class Failing:
        def __del__(self) -> None:
            raise LookupError("from the destructor")

    bus = make_bus(2, drop_oldest=True)
    subscription = bus.subscribe(on_lag="count")
    assert [bus.publish(Failing()) for _ in range(4)] == [1] * 4
    assert raised == ["from the destructor"] * 2
    assert bus.publish("good") == 1
    assert bus.publish("better") == 1
    assert raised == ["from the destructor"] * 4
    assert read_all(subscription) == ["good", "better"]
    bus.publish(Failing())
    subscription.close()
    assert len(raised) == 5
    assert bus.metrics().subscriber_count == 0


def test_an_iterable_that_fails_or_publishes_itself_publishes_nothing_of_its_own(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(8)
    subscription = bus.subscribe()

    def failing() -> Iterator[str]:
        yield "lost with the iterable"
        bus.publish("from the iterable")
        raise LookupError

    with pytest.raises(LookupError):
        bus.publish_many(failing())
    assert read_all(subscription) == ["from the iterable"]
    assert_sums_closed(bus)


def test_destructors_in_many_threads_publish_while_all_publish(make_bus: MakeBus) -> None:
    bus = make_bus(8, drop_oldest=True)
    subscription = bus.subscribe(on_lag="count")

    def work() -> None:
        for _ in range(500):
            bus.publish(_Watched())
            subscription.try_recv()

    _Watched.on_end = lambda: bus.publish("from the destructor")
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _Watched.on_end = None
    assert_sums_closed(bus)
