"""tickbus: an event bus for market data, between threads and asyncio tasks of one process.

Every event goes to every matching subscription, whatever thread or event loop reads it.
No event is lost silently: what a subscription could not take is counted by reason, and the
reader is told where the hole is. `EventStore` keeps events on a disk, `Group`s read it there, and
`RiskEventSystem` delivers those that nobody may miss.
"""

from __future__ import annotations

import atexit
import logging
import os
from typing import TYPE_CHECKING

from tickbus import _core, _warnings
from tickbus._core import (
    AsyncEventSubscription,
    AsyncSystemSubscription,
    BusyPoll,
    Event,
    EventBatch,
    EventSubscription,
    LockFreeEventQueue,
    Shutdown,
    StoreTicket,
    SystemSubscription,
    Topic,
    VirtualClock,
    __version__,
    select,
    sources,
    symbols,
)
from tickbus._metrics import (
    EventBusMetrics,
    EventSystemMetrics,
    Explanation,
    LatencyHistogram,
    SubscriptionMetrics,
)
from tickbus.attach import Attachment, detach_all
from tickbus.bus import BroadcastEventBus, EventBus, LockFreeEventBus, RingEventBus
from tickbus.config import BackpressureConfig
from tickbus.envelope import Clock, Envelope
from tickbus.errors import (
    AckTimeout,
    AlreadyOpen,
    BusError,
    Closed,
    ConfigError,
    Corrupt,
    CriticalOverflow,
    ForkedError,
    Full,
    Lagged,
    ParseError,
    Poisoned,
    PublishTimeout,
    ReadOnly,
    ReceiveTimeout,
    ReplayRefused,
    StaleToken,
    StoreError,
    StoreFull,
    StoreIO,
    SyncTimeout,
    VersionError,
    WrongLoop,
)
from tickbus.event import EventType, Priority
from tickbus.groups import Group, GroupBatch, GroupStats
from tickbus.records import Gap, Record
from tickbus.replay import Replay, ReplayProgress
from tickbus.risk import CriticalDelivery, DeadLetter, Escalation, RiskConsumer, RiskEventSystem
from tickbus.store import (
    Compression,
    EventStore,
    Recovery,
    Retired,
    StoreStats,
    Verification,
)
from tickbus.system import EventSystem

if TYPE_CHECKING:
    # Imported with NumPy when it is used.
    from tickbus.arrays import EVENT_DTYPE as EVENT_DTYPE

__all__ = [
    "AckTimeout",
    "AlreadyOpen",
    "AsyncEventSubscription",
    "AsyncSystemSubscription",
    "Attachment",
    "BackpressureConfig",
    "BroadcastEventBus",
    "BusError",
    "BusyPoll",
    "Clock",
    "Closed",
    "Compression",
    "ConfigError",
    "Corrupt",
    "CriticalDelivery",
    "CriticalOverflow",
    "DeadLetter",
    "Envelope",
    "Escalation",
    "Event",
    "EventBatch",
    "EventBus",
    "EventBusMetrics",
    "EventStore",
    "EventSubscription",
    "EventSystem",
    "EventSystemMetrics",
    "EventType",
    "Explanation",
    "ForkedError",
    "Full",
    "Gap",
    "Group",
    "GroupBatch",
    "GroupStats",
    "Lagged",
    "LatencyHistogram",
    "LockFreeEventBus",
    "LockFreeEventQueue",
    "ParseError",
    "Poisoned",
    "Priority",
    "PublishTimeout",
    "ReadOnly",
    "ReceiveTimeout",
    "Record",
    "Recovery",
    "Replay",
    "ReplayProgress",
    "ReplayRefused",
    "Retired",
    "RingEventBus",
    "RiskConsumer",
    "RiskEventSystem",
    "Shutdown",
    "StaleToken",
    "StoreError",
    "StoreFull",
    "StoreIO",
    "StoreStats",
    "StoreTicket",
    "SubscriptionMetrics",
    "SyncTimeout",
    "SystemSubscription",
    "Topic",
    "Verification",
    "VersionError",
    "VirtualClock",
    "WrongLoop",
    "__version__",
    "select",
    "sources",
    "symbols",
]

logging.getLogger("tickbus").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name == "EVENT_DTYPE":
        from tickbus.arrays import EVENT_DTYPE

        return EVENT_DTYPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_core._after_fork)


@atexit.register
def _close_everything() -> None:
    """Frees threads that wait inside the core, before the interpreter starts to end them."""
    detach_all()
    _core._close_all()
    _warnings.stop()
