#!/bin/sh
# Follows the README's first two commands in ROOT, which holds nothing but a minimal Debian, and says what was missing.
#     debootstrap --variant=minbase stable ROOT && sh tests/fresh.sh ROOT
# As root; what they install stays in ROOT.
set -eu
root=${1:?usage: fresh.sh ROOT}
cd "$(dirname "$0")/.."
rm -rf "$root/cvms"
mkdir "$root/cvms"
cp -R cvms.c proto_wire.h sha3.h Makefile README.md tests "$root/cvms"
cp /etc/resolv.conf "$root/etc/resolv.conf"
commands=$(sed -n 's/^    \(apt-get update && .*\)/\1/p; s/^    \(make run\)$/\1/p' README.md | head -2)
test "$(echo "$commands" | wc -l)" = 2 || { echo "FAIL: README.md does not begin with its two commands"; exit 1; }
echo "$commands" | while read -r command; do
    echo "\$ $command"
    # shellcheck disable=SC2016 # for the shell in ROOT
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive \
        sh -ec 'cd /cvms; eval "$1"' sh "$command" </dev/null >"$root/cvms/log" 2>&1 || {
        tail -20 "$root/cvms/log"
        echo "FAIL, and missing was: $(grep -iE 'not found|no such file|unable to locate|not there' "$root/cvms/log" | head -3)"
        exit 1
    }
    tail -3 "$root/cvms/log"
done
echo "nothing was missing"
