"""What README and guide show is true: their Python runs as printed, and the commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
# A block of Python, and the block of text below it: what it prints.
_EXAMPLE = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
_DOCUMENTS = ("README.md", "docs/guide.md", "docs/events.md")
EXAMPLES = [
    pytest.param(match[1], match[2] or "", id=f"{name}:{text[: match.start()].count(chr(10)) + 1}")
    for name in _DOCUMENTS
    for text in [(_ROOT / name).read_text(encoding="utf-8")]
    for match in _EXAMPLE.finditer(text)
]


@pytest.mark.parametrize("document", _DOCUMENTS)
def test_a_document_has_python_examples_with_their_output(document: str) -> None:
    assert [
        each.values for each in EXAMPLES if str(each.id).startswith(document) and each.values[1]
    ]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_an_example_prints_what_stands_below_it(code: str, output: str) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == (output, "", 0)


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", _README, re.MULTILINE))
    assert named >= {"demo", "test", "bench"}
    assert named <= targets


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.md)`", _README)
    assert named
    assert [name for name in named if not (_ROOT / name).is_file()] == []


def test_every_extra_of_the_readme_exists() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sentence = re.search(r"The other extras are (.*?)\.\n", _README)
    assert sentence is not None
    named = {*re.findall(r"`(\w+)`", sentence[1]), "cli"}
    assert named == set(project["optional-dependencies"])
