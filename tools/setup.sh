#!/bin/sh
# Creates .venv with CPython 3.11 or newer and checks for cargo and a C linker. What is missing is
# installed from Debian where this runs as root and apt-get is there, else it is named.
#
# PYTHON=/path/to/python3 chooses the interpreter. A command that is on PATH may still not run
# (a shim of a version manager), so each candidate is asked by running it.
set -eu
cd "$(dirname "$0")/.."

usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11) or sys.implementation.name != "cpython")' \
        >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" && echo "$PYTHON"
        return
    fi
    for name in python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$name" --version >/dev/null 2>&1 && usable "$name"; then
            echo "$name"
            return
        fi
    done
    return 1
}

# need PACKAGE... installs Debian packages, or names them and ends.
need() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "setup: installing $*"
        apt-get update -qq || true # a stale list is often enough
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null
    else
        echo "setup: install these Debian packages, or what your system calls them: $*" >&2
        exit 1
    fi
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo was not found; install Rust from https://rustup.rs and start a new shell" >&2
    exit 1
fi
command -v cc >/dev/null 2>&1 || need gcc libc6-dev
if ! python=$(find_python); then
    if [ -n "${PYTHON:-}" ]; then
        echo "setup: PYTHON is $PYTHON; it must be CPython 3.11 or newer with venv and ensurepip" >&2
        exit 1
    fi
    need python3 python3-venv
    python=$(find_python) || {
        echo "setup: no CPython 3.11 or newer with venv was found; name one with PYTHON=..." >&2
        exit 1
    }
fi

if ! usable .venv/bin/python; then
    echo "setup: .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
# Dependency groups are read by pip 25.1 and newer.
.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
.venv/bin/python -m pip install --quiet --group "${1:-dev}"
