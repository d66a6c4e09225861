#!/bin/sh
# The main job, as a user will see it: cvms as the server of a smoke test on a free loopback port, which uploads algorithm
# and data to an agent, waits for its run and fetches the results; and `cvms agent` as the agent, at another free port.
# A build without TLS has no keys and uploads nothing.  usage: demo.sh CVMS
set -eu
cvms=$1
here=$(dirname "$0")/vectors
work=$(mktemp -d)
trap 'kill $server 2>/dev/null || :; wait; rm -rf "$work"' EXIT INT TERM
mkfifo "$work/ready"                  # opened by the server once its port is open
case $("$cvms" -version) in
*BearSSL*) set -- -deliver upload -results "$work/results.zip"; port='-agent-port 0' ;;
*) set -- -public-key-path "$here/keys/ed25519.pem" -attested-tls-bool false; port= ;;
esac
HOST=127.0.0.1 PORT=0 "$cvms" -algo-path "$here/inputs/algo.py" -data-paths "$here/inputs/data.csv" \
    -algo-type python -algo-args --epochs,10 "$@" -until complete -timeout 1m -ready-file "$work/ready" &
server=$!
read -r address < "$work/ready"
# shellcheck disable=SC2086 # a flag and its value, or nothing
"$cvms" agent $port -job-id demo-cvm "$address" >"$work/manifest"
wait "$server"
