#!/bin/bash
# Runs COMMAND on the first node of a SLURM allocation, beside a Ray cluster of all its nodes:
#
#   launch/run.sh COMMAND [ARGUMENT ...]
#
# COMMAND finds the cluster by RAY_ADDRESS, with `ray.init(address="auto")`. It runs in the batch script's own process tree,
# outside the step that holds Ray, so that a warning signal reaches COMMAND alone and Ray stays up while it ends in order.
# USR1, TERM and INT arrive at COMMAND as TERM. USR1, which SLURM sends ahead of the time limit, also puts the job back into
# the queue. The exit code is COMMAND's, or 1 where the Ray cluster ended first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v ray >/dev/null || PATH=$(cd "$here/../.venv/bin" && pwd):$PATH # an activated environment wins

READY_TIMEOUT_S=300 # for all nodes to join
END_TIMEOUT_S=60    # for COMMAND to end after a signal, and for Ray to end after COMMAND

say() { echo "$(date +%T) launch: $*" >&2; }

if [ -z "${SLURM_JOB_ID:-}" ]; then
    say "not inside a SLURM job; submit launch/ctpo.sbatch with sbatch, or run \`ctpo train\` directly on one machine"
    exit 2
fi

# The address SLURM itself uses for a node. A name that the batch host resolves to a loopback address is its own.
address_of() {
    local name address
    name=$(scontrol show node --oneliner "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    address=$(getent ahosts "${name:-$1}" | awk 'NR == 1 { print $1 }')
    if [ "$address" != "$name" ] && [[ $address == 127.* || $address == ::1 ]]; then
        address=$(hostname -I | awk '{ print $1 }')
    fi
    if [ -z "$address" ]; then
        say "no address known for node $1 (NodeAddr=$name)"
        return 1
    fi
    echo "$address"
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
places=() # NODE=ADDRESS
for node in "${nodes[@]}"; do
    address=$(address_of "$node")
    places+=("$node=$address")
done
port=$((20000 + SLURM_JOB_ID % 12000)) # below the ephemeral range; jobs that share a node differ
export RAY_ADDRESS=${places[0]#*=}:$port
# whoever reaches the port must also know this job's token
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

ray_pid=
driver_pid=
signalled=
pass_on() {
    signalled=$1
    say "received $1"
    [ -z "$driver_pid" ] || kill -TERM "$driver_pid" 2>/dev/null || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

running() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# Waits for process $1 up to END_TIMEOUT_S seconds, then kills it.
end_of() {
    local deadline=$((SECONDS + END_TIMEOUT_S))
    while running "$1" && ((SECONDS < deadline)); do sleep 0.2; done
    if running "$1"; then
        say "process $1 did not end within $END_TIMEOUT_S s; killing it"
        kill -KILL "$1" 2>/dev/null || true
    fi
}

say "Ray at $RAY_ADDRESS on ${#nodes[@]} node(s): ${places[*]}"
scratch=$(mktemp -d)
mkfifo "$scratch/leash"
srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --overlap --cpu-bind=none --kill-on-bad-exit=1 \
    --input=all --label "$here/node.sh" "$RAY_ADDRESS" "${places[@]}" <"$scratch/leash" >&2 &
ray_pid=$!
exec {leash}>"$scratch/leash" # every node ends its Ray when this closes, also when this script is killed
rm -r "$scratch"

python "$here/wait_for_nodes.py" "${#nodes[@]}" "$READY_TIMEOUT_S" {leash}>&- &
driver_pid=$!
while running "$driver_pid" && running "$ray_pid"; do wait -n "$driver_pid" "$ray_pid" || true; done
code=0
if running "$driver_pid"; then
    say "Ray ended before all nodes had joined; its messages are above"
    kill -TERM "$driver_pid"
    code=1
else
    wait "$driver_pid" || code=$?
fi

if [ "$code" -eq 0 ] && [ -z "$signalled" ]; then
    say "starting: $*"
    "$@" {leash}>&- &
    driver_pid=$!
    [ -z "$signalled" ] || kill -TERM "$driver_pid" # it came while the command was being started
    while running "$driver_pid" && running "$ray_pid"; do wait -n "$driver_pid" "$ray_pid" || true; done
    if running "$driver_pid"; then
        say "the Ray cluster ended while the command was running"
        kill -TERM "$driver_pid" 2>/dev/null || true
        end_of "$driver_pid"
        wait "$driver_pid" || true
        code=1
    else
        wait "$driver_pid" || code=$?
    fi
fi
driver_pid=

exec {leash}>&-
end_of "$ray_pid"
if [ "$signalled" = USR1 ]; then
    say "putting job $SLURM_JOB_ID back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM refused to requeue the job"
fi
say "ended with $code"
exit "$code"
