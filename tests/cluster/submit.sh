#!/usr/bin/env bash
# Test of jobs on a local cluster with the commands of the documents: a job is submitted, stopped, and submitted again.
# Starts Ray with a token, and ends only its own processes. Takes three minutes; the exit code is 0 if all checks pass.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
export PATH="$root/.venv/bin:$PATH"
place=$(mktemp -d -t ray-XXXXXX)   # short, because it contains Ray's sockets
port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
gcs=$(port) dashboard=$(port)

HOME="$place" ray get-auth-token --generate > /dev/null 2>&1   # does not change the user's token
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$place/.ray/auth_token" RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
setsid ray start --head --block --port="$gcs" --num-cpus=2 --node-ip-address=127.0.0.1 --include-dashboard=true \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --temp-dir="$place/ray" > "$place/head.log" 2>&1 &
head=$!
disown   # otherwise, the shell prints a message when it ends
end() {
    code=$?
    kill -TERM -- "-$head" 2>/dev/null || true   # only the process group that setsid created
    for _ in $(seq 50); do kill -0 -- "-$head" 2>/dev/null || break; sleep 0.2; done
    kill -KILL -- "-$head" 2>/dev/null || true
    [ "$code" = 0 ] || tail -n 20 "$place"/*.log
    rm -rf "$place"
    exit "$code"
}
trap end EXIT
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard" RAY_ADDRESS="http://127.0.0.1:$dashboard"

fail() { echo "FAILED: $*" >&2; exit 1; }
until_true() {   # arguments: WHAT COMMAND...; only a hanging process exceeds the limit
    local what=$1; shift
    for _ in $(seq 900); do "$@" > /dev/null 2>&1 && return; sleep 1; done
    fail "waited 900 s in vain until $what"
}
until_true "the cluster is up" ray job list

# A working directory with a recipe, and a large file that must not be uploaded.
work="$place/work"
mkdir -p "$work/experiments" "$work/runs"
cp "$root/.rayignore" "$work/"
head -c 5000000 /dev/zero > "$work/runs/large"
env -u RAY_ADDRESS zscl data prepare embedded --out "$place/data" > /dev/null 2>&1
cat > "$work/experiments/mine.yaml" <<RECIPE
model: embedded
tasks: [$place/data/flags, $place/data/shapes]
method: finetune
optimisation: {steps: 1500, warmup_steps: 20, batch_size: 16}
compute: {device: cpu, checkpoint: {every_steps: 20}, grace_seconds: 900}
RECIPE
cd "$work"
run="$place/shared/run"

echo "== submitted with ray job submit, and stopped"
submit() {   # repeated until the cluster's agent is ready, which is later than the job list
    ray job submit --no-wait --submission-id first --working-dir . \
        --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "900"}}' \
        -- zscl run experiments/mine.yaml --out "$run" > "$place/submit.log" 2>&1
}
until_true "the job is taken" submit
uploaded=$(find "$place/ray" -name "*.zip" -path "*_ray_pkg_*" -size +1000k | head -n 1)
[ -z "$uploaded" ] || fail "more than a megabyte was uploaded: $uploaded"
until_true "it trains" grep -q '"event":"checkpoint_written"' "$run/journal.jsonl"
shown() {   # checks that the metrics that Ray exports contain those of the run
    addresses=$(python -c 'import json, sys; print(*(each for group in json.load(open(sys.argv[1])) for each in group["targets"]))' \
        "$place/ray/prom_metrics_service_discovery.json")
    for address in $addresses; do curl --silent --max-time 5 "http://$address/metrics"; done > "$place/metrics.log"
    grep '^ray_zscl_images_per_second{' "$place/metrics.log" | grep 'run="run"' | grep -q 'worker="0"'
}
until_true "the dashboard has the worker's figures" shown
timeout 900 ray job stop first > "$place/stop.log" 2>&1
until_true "the run is marked" grep -q KILLED "$run/state.json"
[ -f "$run/checkpoint.pt" ] || fail "no checkpoint was left"
! ray job logs first 2>/dev/null | grep -q $'\r' || fail "there are carriage returns in the job's output"

echo "== submitted again with zscl submit, to its end"
zscl submit experiments/mine.yaml --out "$run" > "$place/second.log" 2>&1 || fail "the second job did not succeed"
grep -q "resumes after step" "$place/second.log" || fail "it did not go on"
grep -q FINISHED "$run/state.json" || fail "it is not finished"
[ -f "$run/result.json" ] || fail "there is no result"
! grep -q $'\r' "$place/second.log" || fail "there are carriage returns in the output"
echo "all of it holds"
