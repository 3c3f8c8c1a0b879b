"""Waiting as long as recorded moments are apart."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["LONGEST_GAP", "Pacer"]

LONGEST_GAP = 3_600.0
"""Seconds of recorded time; a longer gap is not waited for unless asked for."""


class Pacer:
    """Lets the moments of a recording come when they are due. What is late is not waited for.

    Args:
        speed: Recorded time per real time, above 0: 1 as recorded, 10 ten times faster.
        longest_gap: Seconds of recorded time; gaps longer than this are not waited for.
        wait: Waits for so many seconds, or less if there is nothing left to wait for; `None` is
            `time.sleep`.

    Attributes:
        skipped_gaps: Gaps that were not waited for.
    """

    def __init__(
        self,
        speed: float,
        longest_gap: float = LONGEST_GAP,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self.skipped_gaps = 0
        self._speed = speed
        self._longest_gap_ns = longest_gap * 1e9
        self._wait = time.sleep if wait is None else wait
        self._due: int | None = None
        self._previous = 0

    def wait_for(self, moment: int) -> None:
        """Waits until a moment in ns of recorded time is due; the first one is due at once."""
        gap = max(moment - self._previous, 0)
        self._previous = moment
        if self._due is None:
            self._due = time.perf_counter_ns()
        elif gap > self._longest_gap_ns:
            self.skipped_gaps += 1
            self._due = time.perf_counter_ns()
        else:
            self._due += int(gap / self._speed)
            wait = self._due - time.perf_counter_ns()
            if wait > 0:
                self._wait(wait / 1e9)
