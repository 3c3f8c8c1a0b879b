"""A long run: everything at once, at random, until the time is over; then the sums must close.

    python tests/soak.py MINUTES [SEED]

For MINUTES, threads and tasks publish on every backend in every way while readers compete, are
cancelled, join, leave and fall behind. Meanwhile 1,000 child interpreters end in the middle of
things, and 10^8 events pass through one bus. It prints one line for each part, and exits with a
traceback if an event was lost, doubled or not accounted for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "python"))

import uvloop

import tickbus
from exits import SCENARIOS, end_all
from growth import MOST_BYTES, bytes_grown_by
from support import BACKENDS, POLICIES, cancel, row_of

INTERPRETERS = 1_000
EVENTS = 10**8
WAITERS = 5
CAPACITY = 256
PATIENCE_WITHOUT_END = 10.0**6  # seconds

Event = tuple[str, int]


class Ledger:
    """What one subscription received: each publisher's events once and in order, or told missed."""

    def __init__(self, subscription: Any) -> None:
        self.subscription = subscription
        self.received = 0
        self.missed = 0
        self._next: dict[str, int] = defaultdict(int)

    def enter(self, event: Event) -> None:
        publisher, number = event
        expected = self._next[publisher]
        lossless = self.subscription.policy == "block"
        assert number == expected if lossless else number >= expected, (event, expected)
        self._next[publisher] = number + 1
        self.received += 1

    def close(self, bus: tickbus.EventBus[Event]) -> None:
        row = row_of(bus, self.subscription)
        assert row.pending == 0, row
        assert row.delivered == self.received, (row, self.received)
        assert sum(row.dropped.values()) == self.missed, (row, self.missed)
        assert row.offered == self.received + self.missed, row


class Mix:
    """One bus, and everybody who uses it."""

    def __init__(self, backend: str, rng: random.Random) -> None:
        self.backend = backend
        self.rng = rng
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.ledgers: list[Ledger] = []
        self.failures: list[BaseException] = []
        patience = tickbus.BackpressureConfig(max_block_duration=PATIENCE_WITHOUT_END)
        self.bus: tickbus.EventBus[Event] = tickbus.EventBus(backend, CAPACITY, patience)
        self.publishers = [self._thread(self._publish, f"thread {n}") for n in range(2)]
        self.publishers.append(self._thread(self._visit))
        loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
        self.readers = [
            self._thread(self._read, self._open(self.bus.subscribe())),
            self._thread(self._read_slowly, self._open(self._lossy())),
            *(
                self._thread(self._run_loop, name, factory, self._open(self.bus.subscribe_async()))
                for name, factory in loops.items()
            ),
        ]
        self.looping = threading.Barrier(len(loops) + 1)

    def start(self) -> None:
        for thread in self.readers + self.publishers:
            thread.start()

    def end(self) -> None:
        """Ends publishing, has everything read, and closes the sums."""
        self.stop.set()
        for thread in self.publishers:
            thread.join()
        self.looping.wait()
        self.bus.close()
        for thread in self.readers:
            thread.join()
        if self.failures:
            raise BaseExceptionGroup(f"the mix on {self.backend} failed", self.failures)
        for ledger in self.ledgers:
            ledger.close(self.bus)
            ledger.subscription.close()

    def _lossy(self) -> tickbus.EventSubscription[Event]:
        return self.bus.subscribe(capacity=CAPACITY, policy="drop_oldest")

    def _open(self, subscription: Any) -> Ledger:
        self.ledgers.append(ledger := Ledger(subscription))
        return ledger

    def _thread(self, function: Callable[..., object], *arguments: object) -> threading.Thread:
        def target() -> None:
            try:
                function(*arguments, random.Random(self.rng.random()))
            except BaseException as failure:
                self.failures.append(failure)
                self.stop.set()
                raise

        return threading.Thread(target=target, daemon=True)

    def _publish(self, name: str, rng: random.Random) -> None:
        number = 0
        while not self.stop.is_set():
            events = [(name, number + place) for place in range(rng.randrange(1, 20))]
            way = rng.randrange(3)
            try:
                if way == 0:
                    self.bus.publish(events[0])
                    number += 1
                elif way == 1:
                    self.bus.publish_timeout(events[0], PATIENCE_WITHOUT_END)
                    number += 1
                else:
                    number += self.bus.publish_many(events)
            except tickbus.Full as full:
                # Nobody has it, or the rest: it comes again, and must not be doubled.
                number += full.accepted or 0
                self.counts["refusals"] += 1
        self.counts["published"] += number

    def _visit(self, rng: random.Random) -> None:
        """Joins with a random policy, reads a little and leaves."""
        while not self.stop.is_set():
            policy = rng.choice(POLICIES[self.backend])
            with self.bus.subscribe(capacity=2 ** rng.randrange(6), policy=policy) as guest:
                for _ in range(rng.randrange(20)):
                    with contextlib.suppress(tickbus.ReceiveTimeout, tickbus.Lagged):
                        guest.recv_timeout(rng.random() / 200)
            self.counts["joins and leaves"] += 1

    def _read(self, ledger: Ledger, rng: random.Random) -> None:
        while True:
            try:
                for event in ledger.subscription.recv_many(rng.randrange(1, 100)):
                    ledger.enter(event)
            except tickbus.Lagged as lagged:
                ledger.missed += lagged.missed
            except tickbus.Closed:
                return

    def _read_slowly(self, ledger: Ledger, rng: random.Random) -> None:
        while True:
            try:
                ledger.enter(ledger.subscription.recv())
            except tickbus.Lagged as lagged:
                ledger.missed += lagged.missed
            except tickbus.Closed:
                return
            if not self.stop.is_set() and rng.random() < 0.1:
                time.sleep(rng.random() / 100)

    def _run_loop(
        self, name: str, factory: Callable[[], Any], ledger: Ledger, rng: random.Random
    ) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self._cancel_at_random(name, ledger, rng))

    async def _cancel_at_random(self, name: str, ledger: Ledger, rng: random.Random) -> None:
        number = 0

        async def wait() -> None:
            while True:
                try:
                    if rng.random() < 0.7:
                        ledger.enter(await ledger.subscription.recv())
                    else:
                        for event in await ledger.subscription.recv_many(5):
                            ledger.enter(event)
                except tickbus.Lagged as lagged:
                    ledger.missed += lagged.missed
                except tickbus.Closed:
                    return

        async def publish() -> None:
            nonlocal number
            while not self.stop.is_set():
                try:
                    await self.bus.publish_async((name, number))
                except tickbus.Full:
                    continue
                number += 1

        kinds = [wait] * WAITERS + [publish]
        tasks = [asyncio.create_task(kind()) for kind in kinds]
        while not self.stop.is_set():
            await asyncio.sleep(rng.choice([0, 0, 0, 0.001]))
            for place in rng.sample(range(len(kinds)), rng.randrange(1, 4)):
                if not await cancel(tasks[place]):
                    tasks[place].result()
                self.counts["cancellations"] += 1
                tasks[place] = asyncio.create_task(kinds[place]())
        await tasks.pop()
        self.counts["published"] += number
        await asyncio.to_thread(self.looping.wait)
        await asyncio.gather(*tasks)


def end_interpreters() -> str:
    """Ends interpreters in the middle of things."""
    runs = itertools.product(SCENARIOS, BACKENDS)
    wrong = end_all(itertools.islice(itertools.cycle(runs), INTERPRETERS))
    assert not wrong, wrong
    return f"{INTERPRETERS} interpreters ended quietly"


def grow() -> str:
    """Passes many events through one bus."""
    grown = {backend: bytes_grown_by(EVENTS, backend, 3_600.0) for backend in BACKENDS}
    assert max(grown.values()) < MOST_BYTES, grown
    return f"{EVENTS} events grew the resident set by {grown} bytes"


def main(minutes: float, seed: int) -> None:
    """Runs every part and says how it went."""
    print(f"soak: {minutes} minutes, seed {seed}", flush=True)
    end = time.monotonic() + 60 * minutes
    rng = random.Random(seed)
    mixes = [Mix(backend, random.Random(rng.random())) for backend in BACKENDS]
    with ThreadPoolExecutor(2) as pool:
        parts: list[Future[str]] = [pool.submit(end_interpreters), pool.submit(grow)]
        for mix in mixes:
            mix.start()
        while (left := end - time.monotonic()) > 0 and not any(mix.stop.is_set() for mix in mixes):
            time.sleep(min(left, 1.0))
        for mix in mixes:
            mix.end()
            counts = ", ".join(f"{count} {what}" for what, count in sorted(mix.counts.items()))
            print(f"soak: {mix.backend}: {counts}; every sum is closed", flush=True)
        for part in parts:
            print(f"soak: {part.result()}", flush=True)
    print("soak: nothing was lost, doubled or left behind")


if __name__ == "__main__":
    main(
        float(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32),
    )
