#!/bin/sh
# Compiles Lmax.java into target/lmax and runs it: it answers requests on its standard input. The
# first line says "ready: ..." or why there is nothing to run. `run.sh --setup` installs what is
# lacking, where this runs as root and apt-get is there.
set -eu
cd "$(dirname "$0")/../../.."
jar=${LMAX_JAR:-/usr/share/java/disruptor.jar}
classes=target/lmax

lacking() {
    ! { command -v javac && command -v java && test -e "$jar"; } >/dev/null 2>&1
}

if [ "${1:-}" = --setup ] && lacking; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "setup: installing default-jdk-headless libdisruptor-java"
        apt-get update -qq || true # a stale list is often enough
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            default-jdk-headless libdisruptor-java </dev/null >/dev/null || true
    fi
fi
if lacking; then
    echo "install the Debian packages default-jdk-headless and libdisruptor-java"
    exit 0
fi
mkdir -p "$classes"
if [ ! -e "$classes/Lmax.class" ] || [ benches/peers/lmax/Lmax.java -nt "$classes/Lmax.class" ]; then
    javac -cp "$jar" -d "$classes" benches/peers/lmax/Lmax.java
fi
[ "${1:-}" = --setup ] || exec java -Xms256m -Xmx256m -XX:+UseSerialGC -cp "$classes:$jar" Lmax \
    "$(dpkg-query -W -f '${Version}' libdisruptor-java 2>/dev/null || echo "of $jar")"
