"""An event as it is delivered, and the clock that stamps it."""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

__all__ = ["Clock", "Envelope", "ReplayedEnvelope"]

_T = TypeVar("_T")


class Clock(Protocol):
    """What tells a bus the time. The module `time` is one."""

    def time_ns(self) -> int:
        """Returns the time in ns since the Unix epoch, UTC, at least 0.

        It runs inside `publish`, before anybody has the event; what it raises, `publish` raises.
        """


class Envelope(NamedTuple, Generic[_T]):
    """An event as a subscription made with `envelope=True` delivers it.

    Attributes:
        sequence: The event's number on its bus, from 0, given when it was published. On `broadcast`
            it is the one order for all. On `lock_free` it is unique, and rises for the events of
            one publisher; two subscriptions may still see two publishers interleaved differently.
            An event that nobody wanted has a number too: a loss is told by `Lagged`, not by a gap.
        topic: The topic that it was published on, or `None`.
        ts_publish: When it was published, by the bus's clock, in ns since the Unix epoch, UTC. 0 is
            unknown: without a clock of its own, a bus looks at none before somebody wants
            envelopes, so a snapshot may have such events.
        event: The event.
    """

    sequence: int
    topic: str | None
    ts_publish: int
    event: _T

    @property
    def replayed(self) -> bool:
        """Whether a replay published it."""
        return isinstance(self, ReplayedEnvelope)


class ReplayedEnvelope(Envelope[_T]):
    """An envelope whose event a replay published."""

    __slots__ = ()
