"""Ends the process without the interpreter's own end.

A thread of the runtime may still be giving its last result to the loop. When it wants the global
interpreter lock back and finds the interpreter ending, the process aborts.
"""

from __future__ import annotations

import os
import sys

import pytest

_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash[_STATUS])
