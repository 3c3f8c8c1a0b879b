#!/bin/sh
# Puts promtool, which checks metrics for Prometheus, into .venv/bin unless it is on PATH. It is
# taken out of Debian's package prometheus, which is not installed: that would start a server.
# Without apt-get the package is named; the test that needs promtool is then left out.
set -eu
cd "$(dirname "$0")/.."

if command -v promtool >/dev/null 2>&1 || [ -x .venv/bin/promtool ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
    echo "promtool: install the Debian package prometheus, or what your system calls it" >&2
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ "$(id -u)" != 0 ] || apt-get update -qq || true # a stale list is often enough
if (cd "$folder" && apt-get download -qq -o APT::Sandbox::User=root prometheus); then
    dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -x -C "$folder" ./usr/bin/promtool
    mv "$folder/usr/bin/promtool" .venv/bin/promtool
else
    echo "promtool: the Debian package prometheus could not be downloaded; install it" >&2
fi
