#!/bin/sh
# Installs Debian's RocksDB where this runs as root and apt-get is there. Without it the table says so
# and leaves it out.
set -eu
package=librocksdb7.8
if ldconfig -p | grep -q librocksdb || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    exit 0
fi
echo "setup: installing $package"
apt-get update -qq || true # a stale list is often enough
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" \
    </dev/null >/dev/null || true
