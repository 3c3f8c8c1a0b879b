"""Logs the crossings of `warn_threshold` from a thread of its own.

Publishers only hand over numbers: a logging handler may be slow, may block or may publish
itself, and none of that may hold up a publish.
"""

from __future__ import annotations

import logging
import os
import threading

from tickbus import _core

__all__ = ["start", "stop"]

_LOGGER = logging.getLogger("tickbus")
_WAIT_SECONDS = 60.0

_lock = threading.Lock()
_stopping = threading.Event()
_thread: threading.Thread | None = None


def start() -> None:
    """Starts the thread that logs, unless it runs already or the interpreter ends."""
    global _thread
    with _lock:
        if _stopping.is_set() or (_thread is not None and _thread.is_alive()):
            return
        _thread = threading.Thread(target=_log_crossings, name="tickbus-warnings", daemon=True)
        _thread.start()


def stop() -> None:
    """Stops the thread for good and waits until it has left."""
    with _lock:
        _stopping.set()
        thread = _thread
    _core._stop_warnings()
    if thread is not None and thread is not threading.current_thread():
        thread.join()


def _log_crossings() -> None:
    while not _stopping.is_set():
        crossing = _core._recv_warning(_WAIT_SECONDS)
        if crossing is None:
            continue
        bus, subscription, pending, threshold = crossing
        _LOGGER.warning(
            "subscription %d of bus %d has %d pending events and reached warn_threshold=%d; "
            "read it faster, give it a larger capacity or close it",
            subscription,
            bus,
            pending,
            threshold,
        )


def _forget_thread() -> None:
    """Lets a forked child, in which the thread does not run, start from nothing."""
    global _lock, _thread
    _lock = threading.Lock()
    _thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_thread)
