"""The command line `tickbus`; its libraries come with the extra `cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_LIBRARIES = ("cyclopts", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: The arguments behind the program's name; `None` takes those of the process.

    Returns:
        0 done, 1 failed, 2 wrong usage, 3 unreadable input, 130 interrupted, 141 nobody reads the
        output.
    """
    try:
        from tickbus.cli import app
    except ModuleNotFoundError as why:
        if (why.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        print(
            f"tickbus: the command line needs {why.name!r}, which is not installed; "
            "pip install 'tickbus[cli]'",
            file=sys.stderr,
        )
        return 1
    return app.run(sys.argv[1:] if argv is None else list(argv))
