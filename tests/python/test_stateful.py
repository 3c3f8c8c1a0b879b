"""A bus against a plain model: publish, receive, cancel, join, leave and close in any order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
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
        return topic is not None and fnmatchcase(topic, self.pattern)

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

    @property
    def stands_before_a_hole(self) -> bool:
        return not self.snapshot and isinstance(self.items[0], Hole)

    def is_exact(self, backend: str) -> bool:
        return backend != "broadcast" or self.policy == "conflate" or self.pattern is None

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
        while len(batch) < limit and self.has_something and not self.stands_before_a_hole:
            event = self.take()
            assert isinstance(event, int)
            batch.append(event)
        return batch


@dataclass
class Ring:
    """The one sequence of a ring, and how far publishing goes before it asks again."""

    capacity: int
    events: list[tuple[int, str | None]] = field(default_factory=list)
    reach: int = 0
    limit: int = 0

    @property
    def tail(self) -> int:
        return len(self.events)

    @property
    def oldest_kept(self) -> int:
        return max(self.reach - self.capacity, 0)

    def make_room(self, readers: list[Any], always_asks: bool) -> list[Any]:
        """Makes room for one event; returns who rejects it, and then there is none."""
        if self.tail < self.limit:
            return []
        passed_over: list[OnRing] = []
        while True:
            self._sweep(readers, passed_over)
            full = [reader for reader in readers if reader.stops_publishing]
            rejecting = [reader for reader in full if reader.policy == "reject"]
            if rejecting or not full:
                self.limit = 0 if always_asks else self.reach
                return rejecting
            passed_over = full

    def _sweep(self, readers: list[OnRing], passed_over: list[OnRing]) -> None:
        stride = max(self.capacity // 4, 1)
        target = self.tail + stride - self.capacity
        for reader in readers:
            if reader.position < target:
                may_lose = reader.policy == "drop_oldest" or reader in passed_over
                reader.move_on(target if may_lose else 0)
        lowest = min([reader.position for reader in readers] + [self.tail])
        self.reach = min(lowest + self.capacity, self.tail + stride)


@dataclass(eq=False)
class OnRing(Model):
    """One subscription as a place in a ring, and the events lost right before it."""

    ring: Ring = field(kw_only=True)
    position: int = field(kw_only=True)
    untold: int = field(kw_only=True)

    def __post_init__(self) -> None:
        self.late = self.untold
        self.offered = len(self.snapshot) + self.untold + self.queued
        self.dropped["overwritten"] = self.untold

    def is_exact(self, backend: str) -> bool:
        return self.pattern is None or self.late == 0

    def wants_at(self, sequence: int) -> bool:
        return self.wants(self.ring.events[sequence][1])

    @property
    def stops_publishing(self) -> bool:
        is_behind = self.position + self.ring.capacity <= self.ring.tail
        return is_behind and self.policy in ("block", "reject")

    @property
    def queued(self) -> int:
        return sum(map(self.wants_at, range(self.position, self.ring.tail)))

    @property
    def has_something(self) -> bool:
        return bool(self.snapshot or self.untold or self.queued)

    @property
    def stands_before_a_hole(self) -> bool:
        return not self.snapshot and self.untold > 0

    def offer(self, event: int, topic: str | None) -> bool:
        self.offered += 1
        return True

    def move_on(self, target: int) -> None:
        """Steps over what it does not want, and before `target` loses what it wants."""
        while self.position < self.ring.tail:
            if self.wants_at(self.position):
                if self.position >= target:
                    return
                self.untold += 1
                self.dropped["block_expired" if self.policy == "block" else "overwritten"] += 1
            self.position += 1

    def take(self) -> int | Hole | None:
        if self.snapshot:
            self.delivered += 1
            return self.snapshot.pop(0)
        if self.untold:
            hole = Hole(self.untold)
            self.untold = 0
            return hole
        self.move_on(0)
        if self.position == self.ring.tail:
            return None
        self.position += 1
        self.delivered += 1
        return self.ring.events[self.position - 1][0]


class BusMachine(RuleBasedStateMachine):
    """Drives a bus and its model side by side; each step compares what came back."""

    backend: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.capacity = CAPACITY
        self.bus = self._make_bus(None)
        self.loop = asyncio.new_event_loop()
        self.open: list[tuple[Subscription, Model]] = []
        self.published = 0
        self.dropped_by_those_that_left = 0
        self.next_event = 0
        self.keeps = False
        self.last: dict[str, int] = {}

    def _make_bus(self, keep_last: str | None) -> tickbus.EventBus[int]:
        patience = tickbus.BackpressureConfig(max_block_duration=0.0)
        return tickbus.EventBus(self.backend, self.capacity, patience, keep_last=keep_last)

    @initialize(keeps=st.booleans())
    def keep_last_events(self, keeps: bool) -> None:
        if keeps:
            self.keeps = True
            self.bus = self._make_bus("trades.>")

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
        if keyless and any(model.key is not None and model.wants(topic) for _, model in self.open):
            with pytest.raises(NoKey):
                self.bus.publish(event, topic)
        elif rejecting := self._rejecting(topic):
            with pytest.raises(tickbus.Full) as caught:
                self.bus.publish(event, topic)
            assert sorted(caught.value.subscriptions) == sorted(rejecting)
        else:
            number = self._offer(event, topic)
            if in_batch:
                assert self.bus.publish_many([event], topic) == 1
            else:
                assert self.bus.publish(event, topic) == number
        self._settle()
        self._serve_waiters()

    @precondition(lambda self: not self.bus.closed)
    @rule(topic=st.sampled_from(TOPICS), count=st.integers(2, 9))
    def publish_many(self, topic: str | None, count: int) -> None:
        """Publishes several before a reader gets its turn."""
        events = range(self.next_event + 1, self.next_event + 1 + count)
        self.next_event += count
        accepted = 0
        rejecting: list[int] = []
        for event in events:
            rejecting = self._rejecting(topic)
            if rejecting:
                break
            self._offer(event, topic)
            accepted += 1
        if rejecting:
            with pytest.raises(tickbus.Full) as caught:
                self.bus.publish_many(events, topic)
            assert sorted(caught.value.subscriptions) == sorted(rejecting)
            assert getattr(caught.value, "accepted", None) == accepted
        else:
            assert self.bus.publish_many(events, topic) == count
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
        self._compare(model, received, expected)

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
        self._compare(model, received, expected)

    @rule(turns=st.integers(1, 3))
    def select(self, turns: int) -> None:
        by_threads = {each: model for each, model in self.open if not self._is_async(each)}
        if not by_threads:
            return
        for _ in range(turns):
            ready = tickbus.select(list(by_threads), timeout=0.0)
            if ready is not None:
                assert self.bus.closed or by_threads[ready].has_something
            else:
                assert not any(model.has_something for model in by_threads.values())

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
            counts_at_once = self.backend != "broadcast" or model.policy == "conflate"
            if counts_at_once or not any(isinstance(item, Hole) for item in model.items):
                assert row.dropped == model.dropped
            assert row.pending == subscription.pending == model.pending
            assert (row.offered, row.delivered) == (model.offered, model.delivered)
            assert row.exact == model.is_exact(self.backend)
            dropped += sum(row.dropped.values())
        assert metrics.total_dropped == dropped

    @invariant()
    def the_last_events_are_those_of_the_model(self) -> None:
        if self.keeps:
            assert self.bus.last("trades.BTCUSDT") == self.last.get("trades.BTCUSDT")

    def _compare(self, model: Model, received: Any, expected: Any) -> None:
        if self.backend == "broadcast" and isinstance(received, Hole) and received != expected:
            # What was overwritten after the reader had come to the hole is told on its own.
            assert isinstance(expected, Hole)
            assert expected.missed > received.missed
            model.items.insert(0, Hole(expected.missed - received.missed))
        else:
            assert received == expected

    def _rejecting(self, topic: str | None) -> list[int]:
        """Returns the ids of those for which the next event on the topic is refused."""
        open_models = [(each.id, model) for each, model in self.open if model.wants(topic)]
        return [id for id, model in open_models if model.policy == "reject" and model.is_full]

    def _offer(self, event: int, topic: str | None) -> int:
        """Gives the event to every model that wants it, and returns the number."""
        number = sum([model.offer(event, topic) for _, model in self.open if model.wants(topic)])
        self._note_published(event, topic)
        return number

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
                self._compare(model, task.result() if error is None else received, expected)
            assert not any(task.done() for task in model.waiters)


async def _await(awaitable: Any) -> Any:
    return await awaitable


class LockFreeMachine(BusMachine):
    backend = "lock_free"


class BroadcastMachine(BusMachine):
    backend = "broadcast"


class RingMachine(BusMachine):
    """Here each publication sees everybody, and who stands behind all decides."""

    backend = "ring"

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(self.capacity)

    @initialize(capacity=st.sampled_from((1, 2, 8, 16)))
    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self.ring = Ring(capacity)
        self.bus = self._make_bus("trades.>" if self.keeps else None)

    @precondition(lambda self: not self.bus.closed and len(self.open) < 6)
    @rule(data=st.data(), by_tasks=st.booleans(), pattern=st.sampled_from(PATTERNS))
    def join(self, data: st.DataObject, by_tasks: bool, pattern: str | None) -> None:
        policy = data.draw(st.sampled_from(POLICIES["ring"]))
        snapshot = self.keeps and data.draw(st.booleans())
        last = list(self.last.values()) if snapshot else []
        subscribe = self.bus.subscribe_async if by_tasks else self.bus.subscribe
        model: Model
        if policy == "conflate":
            key = data.draw(st.sampled_from((None, key_of)))
            capacity = data.draw(st.sampled_from((1, 2, CAPACITY)))
            subscription = subscribe(pattern, capacity, policy=policy, key=key, snapshot=snapshot)
            model = Model(policy, pattern, capacity, key, last)
            self.ring.limit = 0
        else:
            tail, oldest = self.ring.tail, self.ring.oldest_kept
            start = data.draw(st.sampled_from(("now", "oldest")) | st.integers(0, tail))
            first = {"now": tail, "oldest": oldest}.get(start, start)
            subscription = subscribe(pattern, policy=policy, snapshot=snapshot, start=start)
            model = OnRing(
                policy,
                pattern,
                self.capacity,
                snapshot=last,
                ring=self.ring,
                position=max(first, oldest),
                untold=max(oldest - first, 0),
            )
        self.open.append((subscription, model))

    @property
    def _readers(self) -> list[OnRing]:
        return [model for _, model in self.open if isinstance(model, OnRing)]

    def _rejecting(self, topic: str | None) -> list[int]:
        always_asks = self.keeps or len(self._readers) < len(self.open)
        rejecting = self.ring.make_room(self._readers, always_asks)
        return [each.id for each, model in self.open if model in rejecting]

    def _offer(self, event: int, topic: str | None) -> int:
        number = super()._offer(event, topic)
        self.ring.events.append((event, topic))
        return number


LANES = ("critical", "high", "normal")
SYMBOLS = (None, "BTC", "ETH")


@dataclass(frozen=True)
class HoleOfLane:
    """Stands where `Lagged` was raised for a lane."""

    lane: str
    missed: int


class SystemMachine(RuleBasedStateMachine):
    """Drives an event system and a model of each lane side by side, without patience."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[tickbus.SystemSubscription, list[Model]]] = []
        self.overflows: list[tuple[tickbus.CriticalOverflow, set[int]]] = []
        self.next_event = 0
        self.published = 0

    @initialize(critical=st.sampled_from((1, 2, 4)), others=st.sampled_from((1, 2, 8)))
    def make(self, critical: int, others: int) -> None:
        self.critical = critical
        self.system = tickbus.EventSystem(critical, others, others, max_block_duration=0.0)
        self.rings = [Ring(others) for _ in ("high", "normal")]

    def teardown(self) -> None:
        for subscription, _ in self.open:
            subscription.close()
        self.system.close()

    @precondition(lambda self: not self.system.closed and len(self.open) < 4)
    @rule(symbol=st.sampled_from(SYMBOLS))
    def join(self, symbol: str | None) -> None:
        subscription = self.system.subscribe(symbols=symbol)
        pattern = None if symbol is None else f"*.{symbol}"
        assert subscription.pattern == pattern
        overwriting = [
            OnRing("drop_oldest", pattern, ring.capacity, ring=ring, position=ring.tail, untold=0)
            for ring in self.rings
        ]
        self.open.append((subscription, [Model("block", pattern, self.critical), *overwriting]))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.open) - 1))
        subscription, _ = self.open.pop(place)
        subscription.close()
        with pytest.raises(tickbus.Closed):
            subscription.try_recv()

    @rule(lane=st.integers(0, 2), symbol=st.sampled_from(SYMBOLS))
    def publish(self, lane: int, symbol: str | None) -> None:
        event = self._make_event(lane, symbol)
        if self.system.closed:
            with pytest.raises(tickbus.Closed):
                self.system.publish(event)
            return
        taken, missing = self._offer(event)
        if missing:
            with pytest.raises(tickbus.CriticalOverflow) as caught:
                self.system.publish(event)
            self._note_overflow(caught.value, event, taken, missing)
        else:
            assert self.system.publish(event) == taken

    @precondition(lambda self: not self.system.closed)
    @rule(wishes=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(SYMBOLS)), max_size=12))
    def publish_batch(self, wishes: list[tuple[int, str | None]]) -> None:
        events = [self._make_event(lane, symbol) for lane, symbol in wishes]
        for accepted, event in enumerate(events):
            taken, missing = self._offer(event)
            if missing:
                with pytest.raises(tickbus.CriticalOverflow) as caught:
                    self.system.publish_batch(events)
                assert caught.value.accepted == accepted
                self._note_overflow(caught.value, event, taken, missing)
                return
        assert self.system.publish_batch(events) == len(events)

    @precondition(lambda self: self.overflows)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """Gives a critical event to those that missed it and have room by now, and to no other."""
        place = data.draw(st.integers(0, len(self.overflows) - 1))
        overflow, missing = self.overflows.pop(place)
        if self.system.closed:
            with pytest.raises(tickbus.Closed):
                overflow.retry()
            return
        event = overflow.event
        assert event is not None
        here = {each.id: lanes[0] for each, lanes in self.open if each.id in missing}
        full = {id for id, model in here.items() if model.is_full}
        taken = sum([here[id].offer(event.metadata, None) for id in here.keys() - full])
        if full:
            with pytest.raises(tickbus.CriticalOverflow) as caught:
                overflow.retry()
            self._note_overflow(caught.value, event, overflow.taken + taken, full)
        else:
            assert overflow.retry() == taken

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def try_receive(self, data: st.DataObject) -> None:
        subscription, lanes = data.draw(st.sampled_from(self.open))
        first = self._take(lanes)
        received: Any
        try:
            event = subscription.try_recv()
            received = None if event is None else event.metadata
        except tickbus.Lagged as lagged:
            received = HoleOfLane(str(lagged.lane), lagged.missed)
        except tickbus.Closed:
            assert self.system.closed
            received = None
        assert received == first

    @precondition(lambda self: self.open)
    @rule(data=st.data(), limit=st.integers(1, 9))
    def receive_many(self, data: st.DataObject, limit: int) -> None:
        """A batch is what one after another would be, and ends before a hole."""
        subscription, lanes = data.draw(st.sampled_from(self.open))
        first = self._take(lanes)
        if first is None:
            return
        expected = [first]
        while len(expected) < limit and not isinstance(first, HoleOfLane):
            lane = next((lane for lane in lanes if lane.has_something), None)
            if lane is None or lane.stands_before_a_hole:
                break
            expected.append(self._take(lanes))
        try:
            received: Any = [event.metadata for event in subscription.recv_batch(limit)]
        except tickbus.Lagged as lagged:
            received = [HoleOfLane(str(lagged.lane), lagged.missed)]
        assert received == expected

    @rule(really=st.integers(0, 9), drains=st.booleans())
    def close(self, really: int, drains: bool) -> None:
        if really > 0:
            return
        if drains:
            assert self.system.drain(0.0) == self._pending
        else:
            self.system.close()

    @invariant()
    def the_numbers_are_those_of_the_model(self) -> None:
        metrics = self.system.metrics()
        for place, name in enumerate(LANES):
            rows = {row.id: row for row in getattr(metrics, name).subscriptions}
            assert rows.keys() == {subscription.id for subscription, _ in self.open}
            for subscription, lanes in self.open:
                row, model = rows[subscription.id], lanes[place]
                assert row.offered == row.delivered + sum(row.dropped.values()) + row.pending
                assert (row.offered, row.delivered) == (model.offered, model.delivered)
                assert (row.dropped, row.pending) == (model.dropped, model.pending)
        assert (self.system.total_events, self.system.pending) == (self.published, self._pending)

    @property
    def _pending(self) -> int:
        return sum(model.pending for _, lanes in self.open for model in lanes)

    def _make_event(self, lane: int, symbol: str | None) -> tickbus.Event:
        self.next_event += 1
        name = "emergency_stop" if lane == 0 else "price_update"
        priority = tickbus.Priority.High if lane == 1 else tickbus.Priority.Normal
        return tickbus.Event(0, name, priority, symbol=symbol, metadata=self.next_event)

    def _offer(self, event: tickbus.Event) -> tuple[int, set[int]]:
        """Gives the event to the models of its lane; returns how many take it and who misses it."""
        lane = LANES.index(event.lane)
        wanting = {
            each.id: lanes[lane] for each, lanes in self.open if lanes[lane].wants(event.topic)
        }
        if lane > 0:
            readers = [lanes[lane] for _, lanes in self.open]
            self.rings[lane - 1].make_room(readers, always_asks=False)
        missing = {id for id, model in wanting.items() if not model.offer(event.metadata, None)}
        if lane > 0:
            self.rings[lane - 1].events.append((event.metadata, event.topic))
        self.published += 1
        return len(wanting) - len(missing), missing

    def _note_overflow(
        self,
        overflow: tickbus.CriticalOverflow,
        event: tickbus.Event,
        taken: int,
        missing: set[int],
    ) -> None:
        assert (overflow.event, overflow.taken) == (event, taken)
        assert set(overflow.missing) == missing
        self.overflows.append((overflow, missing))

    @staticmethod
    def _take(lanes: list[Model]) -> int | HoleOfLane | None:
        for name, lane in zip(LANES, lanes, strict=True):
            item = lane.take()
            if isinstance(item, Hole):
                return HoleOfLane(name, item.missed)
            if item is not None:
                return item
        return None


_SETTINGS = settings(
    max_examples=200,
    stateful_step_count=50,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestLockFree = LockFreeMachine.TestCase
TestLockFree.settings = _SETTINGS
TestBroadcast = BroadcastMachine.TestCase
TestBroadcast.settings = _SETTINGS
TestRing = RingMachine.TestCase
TestRing.settings = _SETTINGS
TestSystem = SystemMachine.TestCase
TestSystem.settings = _SETTINGS
