"""Runs the command line: `python -m tickbus` is the command `tickbus`."""

from __future__ import annotations

import sys

from tickbus.cli import main

if __name__ == "__main__":
    sys.exit(main())
