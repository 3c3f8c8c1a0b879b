"""A bus against a plain model: publish, receive, cancel, join, leave and close in any order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import tickbus
from support import POLICIES, Hole, Subscription, drops, spin

CAPACITY = 4
TOPICS = (None, "trades.BTCUSDT", "quotes.BTCUSDT")
PATTERNS = (None, "trades.*")
KEYS = 3
REASONS = {
    "block": "block_expired",
    "drop_newest": "refused",
    "drop_oldest": "overwritten",
    "conflate": "overwritten",
}


class NoKey(Exception):
    """Raised by the key function for negative events."""


def key_of(event: int) -> str:
    """The key function of those subscriptions that conflate by one."""
    if event < 0:
        raise NoKey(event)
    return f"key {event % KEYS}"


@dataclass
class Model:
    """One subscription as a list of events and holes, in the order of publishing.

    One that conflates knows the key of each event in the list.
    """

    policy: str
    pattern: str | None
    capacity: int
    key: Callable[[int], Hashable] | None = None
    snapshot: list[int] = field(default_factory=list)
    items: list[int | Hole] = field(default_factory=list)
    keys: dict[Hashable, int] = field(default_factory=dict)
    offered: int = field(init=False)
    delivered: int = 0
    dropped: dict[str, int] = field(default_factory=drops)
    waiters: deque[asyncio.Task[Any]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.offered = len(self.snapshot)

    def wants(self, topic: str | None) -> bool:
        if self.pattern is None:
            return True
        return topic is not None and topic.startswith("trades.")

    @property
    def queued(self) -> int:
        return sum(not isinstance(item, Hole) for item in self.items)

    @property
    def pending(self) -> int:
        return len(self.snapshot) + self.queued

    @property
    def is_full(self) -> bool:
        return self.queued == self.capacity

    @property
    def has_something(self) -> bool:
        return bool(self.snapshot or self.items)

    def offer(self, event: int, topic: str | None) -> bool:
        """Takes the event as its policy says, and returns whether it is in the number."""
        self.offered += 1
        if self.policy == "conflate":
            key = topic if self.key is None else self.key(event)
            older = self.keys.get(key)
            self.keys[key] = event
            if older is not None:
                self.dropped["conflated"] += 1
                self.items[self.items.index(older)] = event
                return True
        if not self.is_full:
            self.items.append(event)
            return True
        self.dropped[REASONS[self.policy]] += 1
        if self.policy not in ("drop_oldest", "conflate"):
            self._miss_at(len(self.items))
            return False
        oldest = next(i for i, item in enumerate(self.items) if not isinstance(item, Hole))
        self._forget(self.items.pop(oldest))
        self._miss_at(oldest)
        self.items.append(event)
        return True

    def _forget(self, event: int | Hole) -> None:
        self.keys = {key: newest for key, newest in self.keys.items() if newest != event}

    def _miss_at(self, place: int) -> None:
        """Adds one missed event to the hole before `place`, or begins one there."""
        before = self.items[place - 1] if place > 0 else None
        if isinstance(before, Hole):
            self.items[place - 1] = Hole(before.missed + 1)
        else:
            self.items.insert(place, Hole(1))

    def take(self) -> int | Hole | None:
        if not self.has_something:
            return None
        item = self.snapshot.pop(0) if self.snapshot else self.items.pop(0)
        self._forget(item)
        self.delivered += not isinstance(item, Hole)
        return item

    def take_many(self, limit: int) -> list[int] | Hole | None:
        first = self.take()
        if first is None or isinstance(first, Hole):
            return first
        batch = [first]
        while len(batch) < limit and self.has_something:
            if not self.snapshot and isinstance(self.items[0], Hole):
                break
            event = self.take()
            assert isinstance(event, int)
            batch.append(event)
        return batch


class BusMachine(RuleBasedStateMachine):
    """Drives a bus and its model side by side; each step compares what came back."""

    backend: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        patience = tickbus.BackpressureConfig(max_block_duration=0.0)
        self.bus: tickbus.EventBus[int] = tickbus.EventBus(self.backend, CAPACITY, patience)
        self.loop = asyncio.new_event_loop()
        self.open: list[tuple[Subscription, Model]] = []
        self.published = 0
        self.dropped_by_those_that_left = 0
        self.next_event = 0
        self.keeps = False
        self.last: dict[str, int] = {}

    @initialize(keeps=st.booleans())
    def keep_last_events(self, keeps: bool) -> None:
        if keeps:
            self.keeps = True
            patience = tickbus.BackpressureConfig(max_block_duration=0.0)
            self.bus = tickbus.EventBus(self.backend, CAPACITY, patience, keep_last="trades.>")

    def teardown(self) -> None:
        for _, model in self.open:
            for waiter in model.waiters:
                waiter.cancel()
        self.loop.run_until_complete(spin())
        for subscription, _ in self.open:
            subscription.close()
        self.bus.close()
        self.loop.close()

    @precondition(lambda self: not self.bus.closed and len(self.open) < 4)
    @rule(data=st.data(), by_tasks=st.booleans())
    def join(self, data: st.DataObject, by_tasks: bool) -> None:
        policy = data.draw(st.sampled_from(POLICIES[self.backend]))
        conflates = policy == "conflate"
        own = self.backend == "lock_free" or conflates
        pattern = data.draw(st.sampled_from(PATTERNS)) if own else None
        capacity = data.draw(st.sampled_from((1, 2, CAPACITY))) if own else CAPACITY
        key = data.draw(st.sampled_from((None, key_of))) if conflates else None
        snapshot = self.keeps and data.draw(st.booleans())
        subscribe = self.bus.subscribe_async if by_tasks else self.bus.subscribe
        subscription = subscribe(pattern, capacity, policy=policy, key=key, snapshot=snapshot)
        model = Model(policy, pattern, capacity, key, list(self.last.values()) if snapshot else [])
        self.open.append((subscription, model))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.open) - 1))
        subscription, model = self.open.pop(place)
        subscription.close()
        self.dropped_by_those_that_left += sum(model.dropped.values()) + model.pending
        self._settle()
        for waiter in model.waiters:
            assert isinstance(waiter.exception(), tickbus.Closed)
        with pytest.raises(tickbus.Closed):
            subscription.try_recv()

    @rule(topic=st.sampled_from(TOPICS), in_batch=st.booleans(), keyless=st.booleans())
    def publish(self, topic: str | None, in_batch: bool, keyless: bool) -> None:
        self.next_event += 1
        event = -self.next_event if keyless else self.next_event
        if self.bus.closed:
            with pytest.raises(tickbus.Closed):
                self.bus.publish(event, topic)
            return
        matching = [(each, model) for each, model in self.open if model.wants(topic)]
        rejecting = [e.id for e, model in matching if model.policy == "reject" and model.is_full]
        if keyless and any(model.key is not None for _, model in matching):
            with pytest.raises(NoKey):
                self.bus.publish(event, topic)
        elif rejecting:
            with pytest.raises(tickbus.Full) as caught:
                self.bus.publish(event, topic)
            assert sorted(caught.value.subscriptions) == sorted(rejecting)
        else:
            number = sum([model.offer(event, topic) for _, model in matching])
            self._note_published(event, topic)
            if in_batch:
                assert self.bus.publish_many([event], topic) == 1
            else:
                assert self.bus.publish(event, topic) == number
        self._settle()
        self._serve_waiters()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), limit=st.integers(1, 6))
    def receive_many(self, data: st.DataObject, limit: int) -> None:
        subscription, model = data.draw(st.sampled_from(self.open))
        if not model.has_something:
            return
        expected = model.take_many(limit)
        task: Any = subscription.recv_many(limit) if self._is_async(subscription) else None
        try:
            if task is None:
                received: Any = subscription.recv_many(limit)
            else:
                received = self.loop.run_until_complete(_await(task))
        except tickbus.Lagged as lagged:
            received = Hole(lagged.missed)
        assert received == expected

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def try_receive(self, data: st.DataObject) -> None:
        subscription, model = data.draw(st.sampled_from(self.open))
        expected = model.take()
        received: Any
        try:
            received = subscription.try_recv()
        except tickbus.Lagged as lagged:
            received = Hole(lagged.missed)
        except tickbus.Closed:
            assert self.bus.closed
            received = None
        assert received == expected

    @precondition(lambda self: not self.bus.closed)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        by_tasks = [(each, model) for each, model in self.open if self._is_async(each)]
        if not by_tasks:
            return
        subscription, model = data.draw(st.sampled_from(by_tasks))
        model.waiters.append(self.loop.create_task(_await(subscription.recv())))
        self._settle()
        self._serve_waiters()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiting = [(model, task) for _, model in self.open for task in model.waiters]
        if not waiting:
            return
        model, task = data.draw(st.sampled_from(waiting))
        task.cancel()
        self._settle()
        assert task.cancelled()
        model.waiters.remove(task)

    @rule(topic=st.sampled_from(TOPICS), data=st.data())
    def cancel_a_woken_waiter(self, topic: str | None, data: st.DataObject) -> None:
        """Publishes and cancels before the woken task runs: the next one has the event."""
        waiting = [(model, task) for _, model in self.open for task in model.waiters]
        if self.bus.closed or not waiting:
            return
        model, task = data.draw(st.sampled_from(waiting))
        self.loop.call_soon(task.cancel)
        model.waiters.remove(task)
        self.publish(topic, in_batch=False, keyless=False)
        assert task.cancelled()

    @precondition(lambda self: not self.bus.closed)
    @rule(really=st.integers(0, 9))
    def close(self, really: int) -> None:
        if really > 0:
            return
        self.bus.close()
        self._settle()
        for _, model in self.open:
            for waiter in model.waiters:
                assert isinstance(waiter.exception(), tickbus.Closed)
            model.waiters.clear()

    @invariant()
    def the_sums_are_closed_and_equal_the_model(self) -> None:
        metrics = self.bus.metrics()
        rows = {row.id: row for row in metrics.subscriptions}
        dropped = self.dropped_by_those_that_left
        assert metrics.total_published == self.published
        assert rows.keys() == {subscription.id for subscription, _ in self.open}
        for subscription, model in self.open:
            row = rows[subscription.id]
            assert row.offered == row.delivered + sum(row.dropped.values()) + row.pending
            own = self.backend == "lock_free" or model.policy == "conflate"
            if own or not any(isinstance(item, Hole) for item in model.items):
                assert row.dropped == model.dropped
            assert row.pending == subscription.pending == model.pending
            assert (row.offered, row.delivered) == (model.offered, model.delivered)
            dropped += sum(row.dropped.values())
        assert metrics.total_dropped == dropped

    @invariant()
    def the_last_events_are_those_of_the_model(self) -> None:
        if self.keeps:
            assert self.bus.last("trades.BTCUSDT") == self.last.get("trades.BTCUSDT")

    def _note_published(self, event: int, topic: str | None) -> None:
        self.published += 1
        if self.keeps and topic is not None and topic.startswith("trades."):
            self.last[topic] = event

    @staticmethod
    def _is_async(subscription: Subscription) -> bool:
        return isinstance(subscription, tickbus.AsyncEventSubscription)

    def _settle(self) -> None:
        self.loop.run_until_complete(spin())

    def _serve_waiters(self) -> None:
        """Gives the model's items to its waiters, first come first served, and compares."""
        for _, model in self.open:
            while model.waiters and model.has_something:
                task, expected = model.waiters.popleft(), model.take()
                assert task.done()
                error = task.exception()
                received = Hole(error.missed) if isinstance(error, tickbus.Lagged) else None
                assert (task.result() if error is None else received) == expected
            assert not any(task.done() for task in model.waiters)


async def _await(awaitable: Any) -> Any:
    return await awaitable


class LockFreeMachine(BusMachine):
    backend = "lock_free"


class BroadcastMachine(BusMachine):
    backend = "broadcast"


_SETTINGS = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestLockFree = LockFreeMachine.TestCase
TestLockFree.settings = _SETTINGS
TestBroadcast = BroadcastMachine.TestCase
TestBroadcast.settings = _SETTINGS
