"""Checks that the modules of rust/core depend one way.

A module may name its own step of `ORDER` and the steps before it, never a later one. What the
crate root re-exports is named by its module inside the crate, so that no dependency hides behind
it. The files of a module's folder form no circle, except those of `KNIT`.

Usage: python tools/check_module_order.py [FOLDER]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ORDER = (
    ("queue",),
    ("sync",),
    ("barrier",),
    ("error",),
    ("topic",),
    ("table",),
    ("names",),
    ("event_type",),
    ("event",),
    ("arrow",),
    ("policy",),
    ("histogram",),
    ("wait",),
    ("conflation", "last", "ring"),
    ("backend",),
    ("metrics",),
    ("bus", "subscription"),
    ("select", "event_queue", "system"),
    ("store",),
    ("delivery",),
)

# Publishing, subscribing and the slots between them are one algorithm.
KNIT = ("bus",)

_STEP = {module: step for step, modules in enumerate(ORDER) for module in modules}
_ROOT = "lib.rs"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PATH = re.compile(r"(?<![\w$])(?:\$?crate|super)\s*::\s*(?P<head>\w+(?!\w|\s*!)|\{)")
_NAME = re.compile(r"\w+")
_SIBLING = re.compile(r"(?<![\w:])super\s*::\s*(\w+|\{[^;]*)")


def violations(folder: Path) -> Iterator[str]:
    """Yields one line, `file:line: what is wrong`, for each use that breaks the order."""
    for path in sorted(folder.rglob("*.rs")):
        inside = path.relative_to(folder)
        if inside.name == _ROOT and len(inside.parts) == 1:
            continue
        module = inside.parts[0].removesuffix(".rs")
        if module not in _STEP:
            yield f"{path}:1: {module} is not in the order; add it to ORDER where it belongs"
            continue
        text = _COMMENT.sub(_blank, path.read_text(encoding="utf-8"))
        for position, name in _names(text, top_level=len(inside.parts) == 1):
            line = text.count("\n", 0, position) + 1
            if name not in _STEP:
                yield f"{path}:{line}: crate::{name} hides its module; name it by module"
            elif _STEP[name] > _STEP[module]:
                yield f"{path}:{line}: {module} uses {name}, which comes later"


def circles(folder: Path) -> Iterator[str]:
    """Yields one line for each folder of a module whose files need each other in a circle."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = {path.stem: path for path in inner.glob("*.rs") if path.stem != "mod"}
        needs = {stem: _siblings(path) & files.keys() - {stem} for stem, path in files.items()}
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            if inner.name not in KNIT:
                yield f"{inner}: {' -> '.join(reversed(error.args[1]))} is a circle"


def _siblings(path: Path) -> set[str]:
    """Returns the names behind `super` in a file, outside of its inner modules."""
    text = _COMMENT.sub(_blank, path.read_text(encoding="utf-8"))
    return {name for match in _SIBLING.finditer(text) for name in _NAME.findall(match[1])}


def _names(text: str, *, top_level: bool) -> Iterator[tuple[int, str]]:
    """Yields position and first segment of each path that starts at the crate root.

    `super` means the crate root only in a file that stands directly in the folder and outside
    its inner modules; there it is read as such where it names a module.
    """
    for match in _PATH.finditer(text):
        is_super = match[0].startswith("super")
        if is_super and not top_level:
            continue
        if match["head"] == "{":
            found = _group_heads(text, match.end())
        else:
            found = iter([(match.start("head"), match["head"])])
        for position, name in found:
            if not is_super or name in _STEP:
                yield position, name


def _group_heads(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Yields the first segment of each member of the `{...}` group that begins before `start`."""
    depth, expects_member, position = 1, True, start
    while depth and position < len(text):
        name = _NAME.match(text, position)
        if name:
            if expects_member and depth == 1:
                yield position, name[0]
            expects_member = False
            position = name.end()
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if text[position] == "," and depth == 1:
            expects_member = True
        position += 1


def _blank(comment: re.Match[str]) -> str:
    """Returns blanks in the shape of a comment, so that positions and lines stay."""
    return re.sub(r"[^\n]", " ", comment[0])


def main() -> int:
    """Prints what breaks the order; returns the exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "rust/core")
    if not (folder / _ROOT).is_file():
        print(f"{folder} holds no {_ROOT}; give the folder of the core crate", file=sys.stderr)
        return 2
    found = [*violations(folder), *circles(folder)]
    print("\n".join(found) or f"module order of {folder}: kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
