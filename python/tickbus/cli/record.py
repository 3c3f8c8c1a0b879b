"""Recording captures into a log, as compact events: see `tickbus.compact`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from tickbus import Event, EventBatch, EventStore
from tickbus.captures import MarketEvent
from tickbus.compact import compact, register

__all__ = ["Recorded", "record"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was written into a log.

    Attributes:
        messages: Messages.
        sequences: Their events.
    """

    messages: int
    sequences: range


def record(
    messages: Iterable[MarketEvent], store: EventStore, on_progress: Callable[[int], None]
) -> Recorded:
    """Appends messages to a log, and makes them durable; of an error what came before is stored.

    Args:
        messages: What to append, in this order.
        store: The log.
        on_progress: Called with the number of messages so far.

    Raises:
        InexactError: A price or a size has more digits than fit.
        ConfigError: A name of the capture cannot be one of an event, or a code is taken.
        StoreError: The log did not take them.
    """
    register()
    first = end = store.stats().next_sequence
    done = 0
    remaining = iter(messages)
    is_over = False
    while not is_over:
        events: list[Event] = []
        before = done
        try:
            for message in islice(remaining, _BATCH):
                events += [*compact(message)]
                done += 1
            is_over = done - before < _BATCH
        finally:
            # What comes before an error, or an interruption, is stored too.
            end = store.append_many(EventBatch(events)).stop
        on_progress(done)
    store.sync()
    return Recorded(done, range(first, end))


_BATCH = 8_192
