"""The wheel: what is in it, and that it is enough, without Rust and without the sources.

The wheel is the one that TICKBUS_WHEEL names, else one that is built here from what `make test`
has compiled.
"""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from test_readme import EXAMPLES

_ROOT = Path(__file__).resolve().parents[2]
_QUICK_START = [each for each in EXAMPLES if str(each.id).startswith("README.md")]
_EXTRAS = re.compile(r"^import (?:anyio|prometheus_client)$", re.MULTILINE)
_WITH_EXTRAS = [each for each in _QUICK_START if _EXTRAS.search(str(each.values[0]))]
_ALONE = [each for each in _QUICK_START if each not in _WITH_EXTRAS]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is tested."""
    if given := os.environ.get("TICKBUS_WHEEL"):
        return Path(given).resolve()
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "maturin", "build", "--release", "--quiet"]
    command += ["--interpreter", sys.executable, "--out", str(out)]
    subprocess.run(command, cwd=_ROOT, check=True, timeout=110)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


class Installation:
    """A virtual environment with the wheel, and a folder to work in that is not the sources'."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "environment"
        self.work = folder / "work"
        self.work.mkdir()
        venv.create(self.home)
        self.commands = self.home / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.commands / "python"
        # No cargo, no compiler, no PYTHONPATH: nothing but what Windows starts programs with.
        kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        self.environment = kept | {"PATH": str(self.commands)}

    def install(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, *arguments], cwd=self.work, check=True, timeout=110)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments,
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installation:
    """The wheel installed where no other package can be had."""
    installation = Installation(tmp_path_factory.mktemp("alone"))
    installation.install("--no-index", str(wheel))
    return installation


@pytest.fixture(scope="module")
def with_extras(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installation:
    """The wheel installed with the extras that the quick start and the command line use."""
    installation = Installation(tmp_path_factory.mktemp("extras"))
    installation.install("--prefer-binary", f"{wheel}[cli,anyio,prometheus]")
    return installation


def test_the_installed_package_is_the_only_one_and_not_the_sources(alone: Installation) -> None:
    code = (
        "import importlib.metadata as m, shutil, tickbus;"
        "print(tickbus.__file__, tickbus._core.__file__);"
        "print([d.name for d in m.distributions()], shutil.which('cargo'), shutil.which('rustc'))"
    )
    done = alone.run(alone.python, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    places, rest = done.stdout.splitlines()
    for place in places.split():
        assert Path(place).resolve().is_relative_to(alone.home.resolve())
    assert rest == "['tickbus'] None None"


@pytest.mark.parametrize(("code", "output"), _ALONE)
def test_the_quick_start_runs_from_the_wheel_alone(
    alone: Installation, code: str, output: str
) -> None:
    done = alone.run(alone.python, "-W", "error", "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


@pytest.mark.parametrize(("code", "output"), _WITH_EXTRAS)
def test_the_quick_start_on_extras_runs_from_the_wheel(
    with_extras: Installation, code: str, output: str
) -> None:
    done = with_extras.run(with_extras.python, "-W", "error", "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_the_command_without_its_extra_says_what_to_install(alone: Installation) -> None:
    done = alone.run(alone.python, "-m", "tickbus", "replay")
    assert done.returncode == 1
    assert "pip install 'tickbus[cli]'" in done.stderr


@pytest.mark.parametrize("as_module", [True, False], ids=["python -m tickbus", "tickbus"])
def test_a_synthetic_replay_from_the_wheel_loses_nothing(
    with_extras: Installation, as_module: bool
) -> None:
    program = (
        [with_extras.python, "-m", "tickbus"] if as_module else [with_extras.commands / "tickbus"]
    )
    done = with_extras.run(*program, "replay", "--json", "--events", "5000")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["published"] == 5_000
    assert report["delivered"] == [5_000] * len(report["delivered"])
    assert report["lost"] == 0
    assert report["totals_agree"]


def test_the_wheel_has_types_and_licenses_and_nothing_that_is_not_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for path in (_ROOT / "python").rglob("*") if path.is_file()]
    compiled = (".pyc", ".so", ".pyd")
    sources = {path.relative_to(_ROOT / "python").as_posix() for path in files}
    sources = {name for name in sources if not name.endswith(compiled)}
    assert sources >= {"tickbus/py.typed", "tickbus/_core.pyi", "tickbus/cli/app.py"}
    package = {name for name in names if not re.match(r"tickbus-[^/]*\.dist-info/", name)}
    (core,) = package - sources
    assert re.fullmatch(r"tickbus/_core\.[\w.-]+\.(so|pyd)", core)
    assert package - {core} == sources
    licenses = {Path(name).name for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE-MIT", "LICENSE-APACHE"}


def test_the_package_requires_nothing_and_offers_its_extras(metadata: Message) -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras)
    required = metadata.get_all("Requires-Dist", [])
    assert [each for each in required if not re.search(r"; extra == '\w+'$", each)] == []
    assert len(required) == sum(len(each) for each in extras.values())


def test_the_metadata_says_what_the_project_says(metadata: Message) -> None:
    version = tomllib.loads((_ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    assert metadata["Version"] == version["workspace"]["package"]["version"]
    assert metadata["License-Expression"] == "MIT OR Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "# tickbus" in metadata.get_payload()


def test_a_manylinux_tag_is_not_older_than_the_symbols_that_are_used(wheel: Path) -> None:
    tag = re.search(r"manylinux_2_(\d+)_", wheel.name)
    if tag is None:
        assert "manylinux" not in wheel.name
        return
    with zipfile.ZipFile(wheel) as archive:
        (core,) = [name for name in archive.namelist() if name.endswith(".so")]
        used = re.findall(rb"GLIBC_2\.(\d+)", archive.read(core))
    assert used
    assert max(map(int, used)) <= int(tag[1])
