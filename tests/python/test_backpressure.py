"""`warn_threshold`: one warning for each crossing, logged by a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

import pytest

import tickbus
from support import MakeBus, run_child

THRESHOLD = 8
SECONDS = 60.0
"""A warning that does not come is told by the test, long before the test's own timeout."""


class Records(logging.Handler):
    """Hands log records from the logging thread to the test, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self.queue.put(record)

    def next(self) -> str:
        record = self.queue.get(timeout=SECONDS)
        assert (record.name, record.levelno) == ("tickbus", logging.WARNING)
        assert record.threadName == "tickbus-warnings"
        return record.getMessage()


@pytest.fixture
def records() -> Iterator[Records]:
    logger = logging.getLogger("tickbus")
    handler = Records()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_each_crossing_is_logged_once_and_re_arms_at_half(
    make_bus: MakeBus, records: Records
) -> None:
    bus = make_bus(64, warn_threshold=THRESHOLD)
    subscription = bus.subscribe("first")
    sentinel = bus.subscribe("sentinel")

    def fill_to(pending: int) -> None:
        while subscription.pending < pending:
            bus.publish("event", "first")

    def read_down_to(pending: int) -> None:
        while subscription.pending > pending:
            subscription.recv()

    fill_to(THRESHOLD - 1)
    fill_to(2 * THRESHOLD)
    message = records.next()
    read_down_to(THRESHOLD // 2 + 1)
    fill_to(2 * THRESHOLD)
    read_down_to(THRESHOLD // 2)
    fill_to(2 * THRESHOLD)
    again = records.next()
    for _ in range(THRESHOLD):
        bus.publish("event", "sentinel")
    for text, one in ((message, subscription), (again, subscription), (records.next(), sentinel)):
        assert text.startswith(f"subscription {one.id} of bus {bus.id} has ")
        assert f"warn_threshold={THRESHOLD}" in text
    assert records.queue.empty()


def test_a_subscription_that_conflates_is_warned_about_by_its_pending_keys(
    make_bus: MakeBus, records: Records
) -> None:
    bus = make_bus(64, warn_threshold=THRESHOLD)
    subscription = bus.subscribe(policy="conflate", key=lambda number: number // 10)
    for number in range(10 * (THRESHOLD - 1)):
        bus.publish(number)
    assert subscription.pending == THRESHOLD - 1
    bus.publish(10 * THRESHOLD)
    assert f"subscription {subscription.id} of bus {bus.id} has {THRESHOLD} " in records.next()
    assert records.queue.empty()


def test_without_a_threshold_nothing_is_logged(make_bus: MakeBus, records: Records) -> None:
    silent = make_bus(64)
    first = silent.subscribe()
    silent.publish_many(range(64))
    loud = make_bus(64, warn_threshold=THRESHOLD)
    second = loud.subscribe()
    loud.publish_many(range(64))
    assert f"of bus {loud.id} " in records.next()
    assert records.queue.empty()
    assert (first.pending, second.pending) == (64, 64)


def test_a_logging_handler_may_publish(make_bus: MakeBus, records: Records) -> None:
    bus = make_bus(64, warn_threshold=THRESHOLD)
    alarms = bus.subscribe("alarms")
    busy = bus.subscribe("busy")

    class Publishing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            bus.publish(record.getMessage(), "alarms")

    handler = Publishing()
    logging.getLogger("tickbus").addHandler(handler)
    try:
        for event in range(THRESHOLD):
            bus.publish(event, "busy")
        assert f"subscription {busy.id} " in alarms.recv()
    finally:
        logging.getLogger("tickbus").removeHandler(handler)
    assert f"subscription {busy.id} " in records.next()


def test_one_thread_logs_for_all_buses(make_bus: MakeBus, records: Records) -> None:
    for _ in range(3):
        bus = make_bus(64, warn_threshold=1)
        subscription = bus.subscribe()
        bus.publish("event")
        assert f"subscription {subscription.id} of bus {bus.id} " in records.next()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("tickbus-warnings") == 1


def test_the_thread_that_logs_does_not_hold_up_the_interpreters_exit() -> None:
    child = run_child(
        """
        import tickbus

        with tickbus.EventBus(backpressure=tickbus.BackpressureConfig(warn_threshold=1)) as bus:
            with bus.subscribe() as subscription:
                bus.publish("event")
                assert subscription.recv() == "event"
        print("end")
        """
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


def test_the_logger_of_tickbus_is_silent_by_default() -> None:
    handlers = logging.getLogger("tickbus").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)
    assert tickbus.BackpressureConfig().warn_threshold is None
