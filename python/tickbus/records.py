"""What a log holds: events and objects, from batches of the core to records, and back.

Objects are stored as MessagePack with the name and the version of their schema: a typed event of
`tickbus.events` under the name of its class, which it is given back as (or as builtins, if its
fields were not of the types that it says); any other `msgspec.Struct`,
dataclass or class under its module and name, of which the builtins are given back, such as a `dict`
of the fields; and builtins under `msgpack`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from tickbus._core import EventBatch

if TYPE_CHECKING:
    from tickbus import _core

__all__ = [
    "Gap",
    "Record",
    "batches_of",
    "decoder",
    "encode",
    "found_by",
    "records_found",
    "records_of",
]


class Gap(NamedTuple):
    """Events that are not in a log: lost before they reached it, or removed from it since.

    Attributes:
        missed: How many.
        exact: Whether that is known exactly; otherwise they are at most so many.
    """

    missed: int
    exact: bool


class Record(NamedTuple):
    """An event as a log holds it.

    Attributes:
        sequence: The record's number in the log, from 0, never reused.
        timestamp: That of the event, in ns since the Unix epoch, UTC; 0 where it has none.
        topic: The topic that it was appended with; of a compact event, that of its type and symbol.
        event: The event; a `Gap` stands where events are missing.
        replayed: Whether it came from a replay.
    """

    sequence: int
    timestamp: int
    topic: str | None
    event: Any
    replayed: bool


def batches_of(
    reader: _core._StoreReader | _core._GroupBatch,
) -> Iterator[tuple[int, EventBatch | list[Record] | Gap]]:
    """Yields what a reader gives, until it has nothing now, with the sequence of the first."""
    while (found := reader.next_batch()) is not None:
        first, records = found
        if isinstance(records, EventBatch):
            yield first, records
        elif isinstance(records, tuple):
            yield first, Gap(*records)
        else:
            yield first, _decoded(records)


def found_by(
    query: _core._StoreQuery,
) -> Iterator[tuple[memoryview, EventBatch] | list[Record]]:
    """Yields what a query finds, until the end of the log: events with their sequences."""
    while (found := query.next_found()) is not None:
        if isinstance(found, tuple):
            sequences, events = found
            yield memoryview(sequences).cast("Q"), events
        else:
            yield _decoded(found)


def _decoded(
    objects: list[tuple[int, int, str | None, str, int, bytes, bool]],
) -> list[Record]:
    return [
        Record(sequence, timestamp, topic, decoder(schema, version)(content), replayed)
        for sequence, timestamp, topic, schema, version, content, replayed in objects
    ]


def records_of(
    batches: Iterator[tuple[int, EventBatch | list[Record] | Gap]],
) -> Iterator[Record]:
    """Yields the records of what `batches_of` yields."""
    for first, records in batches:
        if isinstance(records, EventBatch):
            yield from _event_records(itertools.count(first), records)
        elif isinstance(records, Gap):
            yield Record(first, 0, None, records, False)
        else:
            yield from records


def records_found(
    found: Iterator[tuple[memoryview, EventBatch] | list[Record]],
) -> Iterator[Record]:
    """Yields the records of what `found_by` yields."""
    for records in found:
        yield from records if isinstance(records, list) else _event_records(*records)


def _event_records(sequences: Iterable[int], events: EventBatch) -> Iterator[Record]:
    # There may be more sequences than events.
    for event, sequence in zip(events, sequences, strict=False):
        yield Record(sequence, event.timestamp, event.topic, event, False)


_VERSION = 1
_BUILTINS = "msgpack"


def encode(event: object) -> tuple[int, str, int, bytes]:
    """Returns timestamp, schema, version and bytes of an object; the core calls it."""
    encoder, classes = _msgspec()
    if event is None:
        raise TypeError("None is no event; store what happened")
    try:
        content = encoder(event)
    except (TypeError, ValueError, OverflowError, RecursionError) as why:
        raise TypeError(
            f"an event was of type {type(event).__qualname__}, which msgspec cannot encode: {why}"
        ) from why
    kind = type(event)
    if classes.get(kind.__name__) is kind:
        return _timestamp(event), kind.__name__, _VERSION, content
    if kind.__module__ == "builtins":
        return 0, _BUILTINS, _VERSION, content
    return 0, f"{kind.__module__}.{kind.__qualname__}", _VERSION, content


def _timestamp(event: Any) -> int:
    timestamp: object = event.timestamp
    if isinstance(timestamp, int) and 0 <= timestamp < 1 << 64:
        return timestamp
    raise TypeError(f"timestamp was {timestamp!r}; it must be an integer from 0 to 2^64 - 1, in ns")


@cache
def _msgspec() -> tuple[Callable[[object], bytes], dict[str, type]]:
    """Returns what encodes, and the typed events by their names."""
    try:
        import msgspec
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "objects in a log need msgspec; install it with: pip install 'tickbus[events]'",
            name=missing.name,
        ) from missing
    from tickbus.events import AnyEvent

    return msgspec.msgpack.Encoder().encode, {kind.__name__: kind for kind in get_args(AnyEvent)}


@cache
def decoder(schema: str, version: int) -> Callable[[bytes], Any]:
    """Returns what decodes the objects of a schema."""
    _, classes = _msgspec()
    import msgspec

    to_builtins = msgspec.msgpack.Decoder().decode
    kind = classes.get(schema) if version == _VERSION else None
    if kind is None:
        return to_builtins
    to_kind: Callable[[bytes], Any] = msgspec.msgpack.Decoder(kind).decode

    def decode(content: bytes) -> Any:
        try:
            return to_kind(content)
        except msgspec.ValidationError:
            # A struct does not check its arguments; what it was made of is better than nothing.
            return to_builtins(content)

    return decode
