#!/usr/bin/env bash
# Test on two simulated hosts (network and mount namespaces) without a shared folder: a run is refused if one host does
# not see its folder, and with object storage a run trains on both hosts. Needs root on Linux, iproute2, s3fs and moto.
# Its servers cannot be reached from outside. Takes two minutes; the exit code is 0 if all checks pass.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
export PATH="$root/.venv/bin:$PATH"
place=$(mktemp -d -t ray-XXXXXX)   # short, because it contains Ray's sockets
head=zscl-head-$$ other=zscl-other-$$ head_ip=10.213.0.1 other_ip=10.213.0.2
started=()

end() {
    code=$?
    for group in "${started[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done   # only process groups that this script started
    for group in "${started[@]}"; do
        for _ in $(seq 50); do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.2; done
        kill -KILL -- "-$group" 2>/dev/null || true
    done
    ip netns delete "$head" 2>/dev/null || true
    ip netns delete "$other" 2>/dev/null || true
    [ "$code" = 0 ] || tail -n 20 "$place"/*.log
    rm -rf "$place"
    exit "$code"
}
trap end EXIT
fail() { echo "FAILED: $*" >&2; exit 1; }
until_true() {   # arguments: WHAT COMMAND...; only a hanging process exceeds the limit
    local what=$1; shift
    for _ in $(seq 900); do "$@" > /dev/null 2>&1 && return; sleep 1; done
    fail "waited 900 s in vain until $what"
}

ip netns add "$head" && ip netns add "$other"
ip -n "$head" link add wire type veth peer name wire netns "$other"
ip -n "$head" address add "$head_ip/24" dev wire && ip -n "$other" address add "$other_ip/24" dev wire
for host in "$head" "$other"; do ip -n "$host" link set wire up; ip -n "$host" link set lo up; done

mkdir -p "$place/own" "$place/data"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$place/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$place/token" RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
export AWS_ENDPOINT_URL="http://$head_ip:5000" AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
export GLOO_SOCKET_IFNAME=wire RAY_TRAIN_METRICS_ENABLED=0
zscl data prepare embedded --out "$place/data" > /dev/null 2>&1

on() {   # arguments: HOST LOG COMMAND...; starts a process with private folders "own" and TMPDIR
    local host=$1 log=$2; shift 2
    setsid ip netns exec "$host" unshare --mount bash -c '
        mount -t tmpfs tmpfs "$1/own" && mkdir "$1/own/tmp" && export TMPDIR="$1/own/tmp" && shift && exec "$@"
    ' - "$place" "$@" > "$place/$log" 2>&1 &
    started+=($!)
    disown   # otherwise, the shell prints a message when it ends
}
on "$head" s3.log moto_server -H "$head_ip" -p 5000
on "$head" head.log ray start --head --block --port=6379 --num-cpus=1 --node-ip-address="$head_ip" \
    --include-dashboard=false --temp-dir="$place/ray"
until_true "the head is up" grep -q "Ray runtime started" "$place/head.log"
on "$other" other.log ray start --block --address="$head_ip:6379" --num-cpus=1 --node-ip-address="$other_ip"
until_true "the other is up" grep -q "Ray runtime started" "$place/other.log"
ip netns exec "$head" python -c 'import fsspec; fsspec.filesystem("s3").makedirs("bucket")'

cat > "$place/mine.yaml" <<RECIPE
model: embedded
tasks: [$place/data/flags, $place/data/shapes]
reference: $place/data/reference
method: {preset: zscl, average: {every: 5}}
optimisation: {steps: 20, warmup_steps: 5, batch_size: 16, reference_batch_size: 16}
compute: {device: cpu, workers: 2, address: "$head_ip:6379"}
RECIPE
# Runs a command in the namespaces of the head, so that it sees the head's folder "own".
here() { nsenter --net="/run/netns/$head" --mount="/proc/$(cat "$place/inside")/ns/mnt" env TMPDIR="$place/own/tmp" "$@"; }
pgrep --session "${started[1]}" --full gcs_server | head -n 1 > "$place/inside"

echo "== a folder that the other host does not see is refused"
code=0; here zscl run "$place/mine.yaml" --out "$place/own/runs/mine" > "$place/refused.log" 2>&1 || code=$?
[ "$code" = 2 ] || fail "exit code $code, expected 2"
grep -q "node $other_ip does not see this folder" "$place/refused.log" || fail "it is not named"

echo "== with object storage, both train"
here zscl run "$place/mine.yaml" --out "$place/own/runs/mine" --set compute.storage=s3://bucket/runs > "$place/run.log" 2>&1 \
    || fail "the run did not succeed"
here test -f "$place/own/runs/mine/result.json" || fail "there is no result"
here python - "$place/own/runs/mine" <<'PYTHON' || fail "not both have trained"
import json, sys
from pathlib import Path

import fsspec

assert json.loads(Path(sys.argv[1], "state.json").read_text())["status"] == "FINISHED"
assert fsspec.filesystem("s3").exists("bucket/runs/mine/result.json")
assert json.loads(Path(sys.argv[1], "result.json").read_text())["workers"] == 2
PYTHON
echo "all of it holds"
