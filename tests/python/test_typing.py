"""The types: what users see is exact, the package is strict, the stub equals the module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def _run(tmp_path: Path, *arguments: str) -> None:
    environment = dict(os.environ, MYPY_CACHE_DIR=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_users_see_is_typed_exactly(tmp_path: Path) -> None:
    _run(tmp_path, "mypy", "--strict", "tests/python/typing")


def test_the_stub_equals_the_compiled_module(tmp_path: Path) -> None:
    _run(tmp_path, "mypy.stubtest", "tickbus._core", "--mypy-config-file", "pyproject.toml")
