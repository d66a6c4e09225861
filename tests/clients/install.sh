#!/bin/sh
# Installs what run.py's tests need into the folder $1: the Go clients, grpcurl and h2spec (pinned in
# tools/go.mod) in bin/, a Python venv in
# venv/, grpc-js in js/.  Debian packages (nghttp2-client, curl, nodejs, npm, python3-venv) are added where a command is
# missing.  A second run finds everything in place.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: install.sh FOLDER}/bin" "$1/js"
tools=$(cd "$1" && pwd)

missing=
need() { # need COMMAND PACKAGE...
    command -v "$1" >/dev/null 2>&1 || { shift && missing="$missing $*"; }
}
need h2load nghttp2-client
need curl curl
need node nodejs
need npm npm
python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3 python3-venv"
if [ -n "$missing" ]; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -q
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qy --no-install-recommends $missing
fi
command -v go >/dev/null 2>&1 || { echo "install.sh: Go is needed: https://go.dev/dl" >&2; exit 1; }
if ! (cd "$here/go" && go mod edit -json >/dev/null 2>&1); then # before 1.21 Go fetches no newer one of itself
    module=golang.org/toolchain@v0.0.1-go1.26.0.$(go env GOOS)-$(go env GOARCH)
    got=$(cd / && go mod download -json "$module") || printf '%s\n' "$got" >&2
    newer=$(printf '%s\n' "$got" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    chmod -R +x "${newer:?install.sh: Go 1.26 or newer is needed: https://go.dev/dl}/bin" "$newer/pkg/tool"
    PATH=$newer/bin:$PATH
fi

# fresh NAME TEXT: true when NAME was installed from this very TEXT.
fresh() { [ "$(cat "$tools/$1.stamp" 2>/dev/null)" = "$2" ]; }
done_() { printf '%s\n' "$2" >"$tools/$1.stamp"; }

# Go's own cache makes these quick.
(cd "$here/tools" && GOBIN="$tools/bin" go install tool)
(cd "$here/go" && go build -trimpath -o "$tools/bin/" ./agent ./client ./peer)

wanted=$(cksum <"$here/py/requirements.txt")
if ! fresh venv "$wanted" || ! [ -x "$tools/venv/bin/python" ]; then
    rm -rf "$tools/venv"
    python3 -m venv "$tools/venv"
    "$tools/venv/bin/pip" install -q --disable-pip-version-check -r "$here/py/requirements.txt"
    done_ venv "$wanted"
fi

wanted=$(cksum <"$here/js/package-lock.json")
if ! fresh js "$wanted" || ! [ -d "$tools/js/node_modules/@grpc/grpc-js" ]; then
    cp "$here/js/package.json" "$here/js/package-lock.json" "$tools/js/"
    (cd "$tools/js" && npm ci --loglevel=error --no-audit --no-fund --ignore-scripts)
    done_ js "$wanted"
fi
