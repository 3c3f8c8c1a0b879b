"""Prints what `cargo bench` measured as the tables of benches/README.md.

The figure of a benchmark is the middle one of the three that criterion prints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_MEASURED = Path(__file__).parent.parent / "target/criterion"


def main() -> int:
    """Prints a table for each group with parameters, and returns the exit status."""
    groups = sorted(path for path in _MEASURED.glob("*") if path.name != "report")
    if not groups:
        print(f"{_MEASURED} has nothing; run `cargo bench` first", file=sys.stderr)
        return 1
    for group in groups:
        found: dict[str, dict[int, float]] = {}
        for path in group.glob("*/*/new/estimates.json"):
            name, parameter = path.parts[-4:-2]
            found.setdefault(name, {})[int(parameter)] = _nanoseconds(path)
        parameters = sorted({parameter for row in found.values() for parameter in row})
        print(f"\n| {group.name}, ns | {' | '.join(map(str, parameters))} |")
        print(f"|---|{'---:|' * len(parameters)}")
        for name, row in sorted(found.items(), key=lambda item: sorted(item[1].items())):
            cells = [f"{row[p]:.1f}" if p in row else "" for p in parameters]
            print(f"| `{name}` | {' | '.join(cells)} |")
    empty = _nanoseconds(_MEASURED / "publish/empty/new/estimates.json")
    print(f"\nthe empty base case takes {empty:.1f} ns and is included")
    return 0


def _nanoseconds(path: Path) -> float:
    estimates = json.loads(path.read_text())
    return float((estimates["slope"] or estimates["mean"])["point_estimate"])


if __name__ == "__main__":
    sys.exit(main())
