"""Batches of compact events: a sequence, a buffer, and arrays of NumPy."""

from __future__ import annotations

import ctypes
import gc
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tickbus
from support import run_child
from tickbus import EVENT_DTYPE, Event, EventBatch, EventType

NOON = 1_767_268_800_000_000_123
EVENTS = [
    Event(NOON, EventType.PriceUpdate, 0, "binance", "BTCUSDT", 61_000.5, 2**64 - 1),
    Event(NOON + 1, EventType.PriceUpdate, 1, "kraken", "ETHUSDT", -0.0, 0),
    Event(0, EventType.EmergencyStop, 2, None, None, float("inf"), 1),
]
BYTES = st.lists(st.binary(min_size=32, max_size=32), max_size=40)


def _events(count: int) -> list[Event]:
    return [EVENTS[0].replace(metadata=number) for number in range(count)]


def test_a_batch_is_a_sequence_of_its_events() -> None:
    batch = EventBatch(EVENTS)
    assert len(batch) == 3
    assert [*batch] == [*EventBatch(tuple(EVENTS))] == [*EventBatch(iter(EVENTS))] == EVENTS
    assert [*reversed(batch)] == EVENTS[::-1]
    assert [batch[place] for place in range(-3, 3)] == EVENTS * 2
    assert EVENTS[1] in batch
    assert EVENTS[1].replace(value=3.0) not in batch
    assert None not in batch
    assert batch == EventBatch(batch) == EventBatch(EVENTS)
    assert batch != EventBatch(EVENTS[:2])
    assert batch != EVENTS
    assert not EventBatch([])
    assert repr(batch) == "<EventBatch of 3 events>"
    assert iter(batch).__length_hint__() == 3
    for place in (3, -4):
        with pytest.raises(IndexError, match=f"index was {place}; the batch has 3 events"):
            batch[place]


@given(st.integers(0, 12), st.slices(12))
def test_a_slice_of_a_batch_is_that_of_a_list(count: int, part: slice) -> None:
    events = _events(count)
    cut = EventBatch(events)[part]
    assert type(cut) is EventBatch
    assert [*cut] == events[part]


@given(BYTES)
def test_bytes_and_arrays_of_any_events_come_back(rows: list[bytes]) -> None:
    data = b"".join(rows)
    batch = EventBatch([Event.from_bytes(row) for row in rows])
    assert batch.to_bytes() == bytes(batch) == bytes(memoryview(batch)) == data
    assert EventBatch.from_bytes(data) == EventBatch.from_bytes(bytearray(data)) == batch
    array = batch.to_numpy()
    assert array.tobytes() == data
    assert EventBatch(array) == EventBatch(array.copy()) == batch


def test_the_dtype_is_the_layout_of_an_event() -> None:
    assert EVENT_DTYPE.itemsize == 32
    assert EVENT_DTYPE.isnative
    fields = {name: (kind.str[1:], offset) for name, (kind, offset) in EVENT_DTYPE.fields.items()}
    assert fields == {
        "timestamp": ("u8", 0),
        "event_type": ("u1", 8),
        "priority": ("u1", 9),
        "source_id": ("u2", 10),
        "symbol": ("u4", 12),
        "value": ("f8", 16),
        "metadata": ("u8", 24),
    }
    assert tuple(EVENT_DTYPE.names) == Event.__match_args__


@given(BYTES)
def test_both_sides_read_the_same_fields(rows: list[bytes]) -> None:
    batch = EventBatch.from_bytes(b"".join(rows))
    array = batch.to_numpy()
    names = {name: name for name in EVENT_DTYPE.names} | {"symbol": "symbol_id"}
    for name, attribute in names.items():
        fields = [getattr(event, attribute) for event in batch]
        if name == "priority":
            # Its highest bit says that a replay published the event.
            pairs = zip(fields, batch, strict=True)
            fields = [priority | event.replayed << 7 for priority, event in pairs]
        read = np.array(fields, EVENT_DTYPE[name])
        # As bytes, because of what is not a number.
        assert array[name].tobytes() == read.tobytes()


def test_an_array_of_a_batch_is_its_memory_and_keeps_it() -> None:
    batch = EventBatch(_events(1_000))
    array = batch.to_numpy()
    assert array.dtype is EVENT_DTYPE
    assert np.shares_memory(array, batch.to_numpy())
    as_array = np.asarray(batch)
    assert as_array.dtype == EVENT_DTYPE
    assert np.shares_memory(array, as_array)
    assert not array.flags.writeable
    assert not as_array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array["value"] = 0.0
    del batch
    gc.collect()
    assert array["metadata"].tolist() == [*range(1_000)]


def test_a_batch_is_a_copy_of_an_array() -> None:
    array = np.zeros(3, EVENT_DTYPE)
    array["value"] = 1.0, 2.0, 3.0
    batch = EventBatch(array)
    array["value"] = 0.0
    assert [event.value for event in batch] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("part", [np.s_[::2], np.s_[::-1], np.s_[3:3], np.s_[5:2:-1], np.s_[1:]])
def test_an_array_may_have_any_strides(part: Any) -> None:
    array = EventBatch(_events(10)).to_numpy()[part]
    assert [event.metadata for event in EventBatch(array)] == array["metadata"].tolist()


def test_an_array_may_lie_anywhere() -> None:
    data = EventBatch(EVENTS).to_bytes()
    array = np.frombuffer(b"?" + data, EVENT_DTYPE, offset=1)
    assert array.ctypes.data % 8 != 0
    assert EventBatch(array).to_bytes() == data
    part_of_wider = np.zeros(3, [("before", "u1"), ("event", EVENT_DTYPE)])
    part_of_wider["event"] = EventBatch(EVENTS).to_numpy()
    assert EventBatch(part_of_wider["event"]) == EventBatch(EVENTS)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ([EVENTS[0], 1], TypeError, "an item was 1; it must be an Event"),
        (iter([None]), TypeError, "an item was None; it must be an Event"),
        (bytes(32), TypeError, "bytes are read by EventBatch.from_bytes"),
        (7, TypeError, "int"),
        (np.zeros(32, np.uint8), TypeError, "dtype was uint8; it must be EVENT_DTYPE"),
        (np.zeros(1, "V32"), TypeError, "it must be EVENT_DTYPE"),
        (np.zeros(2, EVENT_DTYPE.newbyteorder()), TypeError, "it must be EVENT_DTYPE"),
        (np.zeros((2, 2), EVENT_DTYPE), ValueError, "the array had 2 dimensions; it must have 1"),
        (np.zeros((), EVENT_DTYPE), ValueError, "the array had 0 dimensions; it must have 1"),
    ],
    ids=repr,
)
def test_what_holds_no_events_is_refused(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        EventBatch(wrong)


def test_an_error_of_what_is_iterated_over_goes_on() -> None:
    def events() -> Any:
        yield EVENTS[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        EventBatch(events())


def test_bytes_that_are_no_whole_events_are_refused() -> None:
    with pytest.raises(ValueError, match="data had 33 bytes; it must be a multiple of 32"):
        EventBatch.from_bytes(bytes(33))
    with pytest.raises(TypeError):
        EventBatch.from_bytes("text")  # type: ignore[arg-type]


def test_a_view_of_a_batch_says_what_is_in_it_and_refuses_writing() -> None:
    batch = EventBatch(EVENTS)
    with memoryview(batch) as view:
        assert (view.itemsize, view.shape, view.strides, view.nbytes) == (32, (3,), (32,), 96)
        assert view.readonly
        assert view.c_contiguous
        assert view[1:].tobytes() == batch.to_bytes()[32:]
        assert np.dtype(np.asarray(view).dtype) == EVENT_DTYPE
    writable: Any = batch
    with pytest.raises(TypeError, match="not writable"):
        ctypes.c_char.from_buffer(writable)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_a_batch_keeps_every_bit(protocol: int) -> None:
    for batch in (EventBatch(EVENTS * 100), EventBatch([])):
        assert pickle.loads(pickle.dumps(batch, protocol)) == batch


def test_a_pickled_batch_takes_its_names_to_a_process_with_other_numbers() -> None:
    EventType.register("index_change", 21)
    batch = EventBatch([*EVENTS, EVENTS[0].replace(event_type=21, symbol="SOLUSDT")])
    script = f"""if True:
        import pickle, tickbus
        for name in ("A", "B", "C"):
            tickbus.symbols.intern(name)
            tickbus.sources.intern(name)
        for event in pickle.loads({pickle.dumps(batch)!r}):
            assert event.symbol_id not in (1, 2, 3) and event.source_id not in (1, 2, 3)
            print(event.event_type.name, event.source, event.symbol, event.metadata)
    """
    child = run_child(script, 60.0)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.splitlines() == [
        f"{event.event_type.name} {event.source} {event.symbol} {event.metadata}" for event in batch
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"event_type": 253}, "event_type was 253, which has no name"),
        ({"symbol": (1 << 32) - 1}, "symbol was 4294967295, which has no name"),
        ({"source_id": (1 << 16) - 1}, "source_id was 65535, which has no name"),
    ],
)
def test_a_number_without_a_name_does_not_leave_the_process(
    change: dict[str, Any], text: str
) -> None:
    batch = EventBatch([EVENTS[0], EVENTS[0].replace(**change)])
    with pytest.raises(tickbus.ConfigError, match=text):
        pickle.dumps(batch)
    # Nor does one come in, whatever the pickle says.
    restore, (_, types, sources, symbols) = EventBatch(EVENTS[:1]).__reduce__()
    with pytest.raises(tickbus.ConfigError, match=text):
        restore(batch.to_bytes(), types, sources, symbols)


@pytest.mark.parametrize(
    ("types", "sources", "symbols"),
    [
        ({0: "not_price_update"}, {}, {}),
        ({0: "price_update"}, {1: "two words"}, {}),
        ({0: "price_update"}, {}, {1: ""}),
    ],
)
def test_names_that_cannot_be_here_are_refused(
    types: dict[int, str], sources: dict[int, str], symbols: dict[int, str]
) -> None:
    restore = EventBatch([]).__reduce__()[0]
    with pytest.raises(tickbus.ConfigError):
        restore(b"", types, sources, symbols)


def test_numpy_is_imported_only_for_arrays_and_the_error_says_what_to_install() -> None:
    script = """if True:
        import sys
        sys.modules["numpy"] = None
        import tickbus
        batch = tickbus.EventBatch([tickbus.Event(1, 0)])
        assert tickbus.EventBatch.from_bytes(bytes(batch)) == batch
        for use in (lambda: tickbus.EVENT_DTYPE, batch.to_numpy):
            try:
                use()
            except ModuleNotFoundError as error:
                print(error.name, error)
        del sys.modules["numpy"]
        assert len(batch.to_numpy()) == len(tickbus.EVENT_DTYPE.names) - 6
    """
    child = run_child(script, 60.0)
    assert (child.returncode, child.stderr) == (0, "")
    needed = "numpy arrays of events need NumPy; install it with: pip install 'tickbus[numpy]'"
    assert child.stdout.splitlines() == [needed] * 2


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tickbus' has no attribute 'EVENTS'"):
        tickbus.EVENTS  # type: ignore[attr-defined]  # noqa: B018
