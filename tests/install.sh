#!/bin/sh
# Installs what the tests need, on Debian: compilers with their sanitizers, musl, Python, Go, Node.js and the clients.
# Run as root, or with sudo.  On another system install the same by its own means; what is missing is skipped by name.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
packages="gcc clang llvm libclang-rt-dev binutils valgrind cppcheck make libbearssl-dev musl-tools python3 python3-venv openssl openssh-client curl nghttp2-client golang nodejs npm"
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
