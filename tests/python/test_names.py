"""Everything that `docs/names.md` names is there."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

_NAMES = (Path(__file__).resolve().parents[2] / "docs" / "names.md").read_text(encoding="utf-8")
_PYTHON = _NAMES[_NAMES.index("## Python") : _NAMES.index("## Rust")]
_ENTRY = re.compile(r"`(tickbus(?:\.\w+)+)(?:\(([\w, ]*)\))?`")
_ENTRIES = sorted({(match[1], match[2] or "") for match in _ENTRY.finditer(_PYTHON)})


def _resolve(path: str) -> Any:
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[name] if name in fields else getattr(found, name)
        return found
    raise AssertionError(f"{path} is in no module")


def test_every_row_of_the_names_has_an_entry() -> None:
    rows = [line for line in _PYTHON.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    assert [row for row in rows if not _ENTRY.search(row)] == []


@pytest.mark.parametrize(("path", "parameters"), _ENTRIES, ids=[path for path, _ in _ENTRIES])
def test_a_name_is_where_the_table_says(path: str, parameters: str) -> None:
    found = _resolve(path)
    wanted = [name.strip() for name in parameters.split(",") if name.strip()]
    if wanted:
        assert set(wanted) <= set(inspect.signature(found).parameters)
