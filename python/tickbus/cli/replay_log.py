"""The replay of a log to asyncio subscribers, which sum what `tickbus record` has written.

```
log ─► Replay ─► bus ─► N subscriptions ─► N tasks of one loop: totals
 └────────────── an independent pass over the log ──────────────► totals
```
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

from tickbus import Event, EventBatch, EventBus, EventStore, EventType, Gap, Replay
from tickbus.cli.replay import ReplayPlan, receive, tick
from tickbus.cli.totals import EXACT, Instruments, Totals
from tickbus.compact import ASK, BID, SIZE_UNIT, TRADE, UNKNOWN_SIZE, register

__all__ = ["LogOutcome", "replay_log", "tally_log"]


@dataclass(frozen=True, slots=True)
class LogOutcome:
    """What happened in the replay of a log.

    Attributes:
        backend: The backend that carried the events.
        replayed: Records that were replayed.
        missed: Events that the log says were lost on the way into it, or were removed since.
        skipped_gaps: Gaps in time that were not waited for.
        digest: That of what was replayed.
        elapsed_seconds: From the beginning to the last subscriber's last sum.
        delivered: Records received, by subscriber.
        kinds: Records by event type, and objects, that the first subscriber received.
        totals: What each subscriber summed.
    """

    backend: str
    replayed: int
    missed: int
    skipped_gaps: int
    digest: str
    elapsed_seconds: float
    delivered: tuple[int, ...]
    kinds: dict[str, int]
    totals: tuple[Instruments, ...]

    @property
    def lost(self) -> int:
        """Records that were replayed but not received, summed over subscribers."""
        return sum(self.replayed - count for count in self.delivered)


@dataclass(slots=True)
class _Sums:
    """What is summed of records."""

    totals: Instruments = field(default_factory=lambda: defaultdict(Totals))
    kinds: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def add(self, records: Iterable[Any]) -> None:
        for record in records:
            if not isinstance(record, Event):
                self.kinds["objects"] += 1
            elif record.event_type == EventType.ReplayEnded and record.replayed:
                continue
            else:
                self._add(record)
            self.count += 1

    def _add(self, event: Event) -> None:
        code = event.event_type
        self.kinds[code.name or f"type {int(code)}"] += 1
        if code not in (TRADE, BID, ASK):
            return
        total = self.totals[event.source or "", event.symbol or ""]
        # The text of the float is the price as it was written.
        price = Decimal(repr(event.value))
        if code == TRADE:
            size = Decimal(0 if event.metadata == UNKNOWN_SIZE else event.metadata) * SIZE_UNIT
            total.trades += 1
            total.volume += size
            total.notional += price * size
        elif code == BID:
            total.quotes += 1
            total.bid_sum += price
        else:
            total.ask_sum += price


async def replay_log(
    log: Path, plan: ReplayPlan, on_progress: Callable[[int], None] | None = None
) -> LogOutcome:
    """Replays a log to asyncio subscribers of this event loop.

    Args:
        log: The folder.
        plan: How.
        on_progress: Called about ten times a second with the number of records so far.

    Raises:
        ConfigError: The backend is unknown or the capacity is out of range.
        StoreError: The log cannot be read.
    """
    register()
    with EventBus[Any](plan.backend, plan.capacity) as bus:
        subscriptions = [bus.subscribe_async() for _ in range(plan.subscribers)]
        sums = [_Sums() for _ in subscriptions]
        began = time.perf_counter()
        with Replay(log).into(bus, plan.speed, longest_gap=plan.longest_gap) as replay:
            ticker = asyncio.create_task(tick(lambda: replay.progress.replayed, on_progress))
            try:
                async with asyncio.TaskGroup() as group:
                    for subscription, summed in zip(subscriptions, sums, strict=True):
                        group.create_task(receive(subscription, summed.add))
                    group.create_task(_close_behind(replay, bus))
            except* Exception as errors:
                raise errors.exceptions[0] from None
            finally:
                ticker.cancel()
            progress = await replay
    return LogOutcome(
        bus.backend,
        progress.replayed,
        progress.missed,
        progress.skipped_gaps,
        replay.digest,
        time.perf_counter() - began,
        tuple(summed.count for summed in sums),
        dict(sorted(sums[0].kinds.items())),
        tuple(dict(summed.totals) for summed in sums),
    )


def tally_log(log: Path) -> Instruments:
    """Returns the totals of an independent pass over a log.

    Raises:
        StoreError: The log cannot be read.
    """
    register()
    sums = _Sums()
    with localcontext(EXACT), EventStore.open(log, read_only=True) as store:
        for _, records in store.read_batches():
            if isinstance(records, EventBatch):
                sums.add(records)
            elif not isinstance(records, Gap):
                sums.add(record.event for record in records)
    return dict(sums.totals)


async def _close_behind(replay: Replay, bus: EventBus[Any]) -> None:
    """Closes the bus at the end of the replay: subscribers first read what is pending."""
    try:
        await replay
    finally:
        bus.close()
