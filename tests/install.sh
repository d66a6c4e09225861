#!/bin/sh
# Installs what the tests need, on Debian: compilers with their sanitizers, musl, Python, Go, Node.js and the clients.
# Run as root, or with sudo.  On another system install the same by its own means; what is missing is skipped by name.
# usage: install.sh [cross]; with cross also the compilers of the machines that make check-cross adds.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
packages="gcc clang llvm libclang-rt-dev binutils valgrind cppcheck make tcc libbearssl-dev musl-tools python3 python3-venv openssl openssh-client curl skopeo faketime nghttp2-client golang nodejs npm
    qemu-user gcc-i686-linux-gnu libc6-dev-i386-cross gcc-s390x-linux-gnu libc6-dev-s390x-cross"
machines="i386 s390x"
if [ "${1-}" = cross ]; then
    packages="$packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross
        gcc-riscv64-linux-gnu libc6-dev-riscv64-cross"
    machines="$machines arm64 armhf riscv64"
fi
missing=
for p in $packages; do
    case $p in
    golang) command -v go >/dev/null && continue ;;
    nodejs) command -v node >/dev/null && continue ;;
    npm) command -v npm >/dev/null && continue ;;
    esac
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
    apt-get update
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
fi
if [ -x "$here/clients/install.sh" ]; then
    mkdir -p "$here/../build/tools"
    sh "$here/clients/install.sh" "$here/../build/tools"
fi
# BearSSL of other machines, unpacked here by apt without a word to dpkg; where Debian has none for one, it is tested without.
for m in $machines; do
    to=$here/../build/tools/cross/$m
    [ ! -e "$to/usr" ] && mkdir -p "$to/lists/partial" || continue
    (cd "$to"; apt="apt-get -q -o APT::Architecture=$m -o APT::Architectures=$m -o Dir::State::Lists=$to/lists -o Dir::Cache::pkgcache=
        -o Dir::Cache::srcpkgcache= -o Acquire::Languages=none -o APT::Sandbox::User=root"
        $apt update; $apt download libbearssl-dev && dpkg-deb -x libbearssl-dev_*.deb . && rm -f usr/lib/*/*.so) ||
        echo "install.sh: no BearSSL for $m" >&2
    rm -rf "$to/lists" "$to"/*.deb
done
