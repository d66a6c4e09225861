#!/bin/sh
# The main job, as a user will see it: cvms as the server of a smoke test on a free loopback port, and `cvms agent` as the
# agent, until the verdict.  usage: demo.sh CVMS
set -eu
cvms=$1
here=$(dirname "$0")/vectors
work=$(mktemp -d)
trap 'kill $server 2>/dev/null || :; wait; rm -rf "$work"' EXIT INT TERM
mkfifo "$work/ready"                  # opened by the server once its port is open
HOST=127.0.0.1 PORT=0 "$cvms" -algo-path "$here/inputs/algo.py" -data-paths "$here/inputs/data.csv" \
    -algo-type python -algo-args --epochs,10 -public-key-path "$here/keys/ed25519.pem" -attested-tls-bool false \
    -until complete -timeout 1m -ready-file "$work/ready" &
server=$!
read -r address < "$work/ready"
"$cvms" agent -job-id demo-cvm "$address" >"$work/manifest.json"
wait "$server"
