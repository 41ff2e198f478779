#!/bin/bash
# Ray on one node of the allocation, in the foreground; run.sh starts it once per node:  node.sh HEAD:PORT NODE=ADDRESS ...
# It runs until its standard input closes or TERM arrives, and then ends what it started and nothing else (`ray stop` would end
# every Ray of the user on this host).
set -euo pipefail
head=$1
shift
mine=
for place in "$@"; do
    [ "${place%%=*}" != "$SLURMD_NODENAME" ] || mine=${place#*=}
done
if [ -z "$mine" ]; then
    echo "node.sh: $SLURMD_NODENAME is not among $*" >&2
    exit 2
fi

# short, since Unix sockets live below it; not shared between jobs, nor between nodes on one host
scratch=$(mktemp -d "/tmp/ray-$SLURM_JOB_ID-XXXXXX")
trap 'rm -rf "$scratch"' EXIT

options=(--block --disable-usage-stats --log-color false --node-ip-address "$mine" --temp-dir "$scratch" --dashboard-agent-listen-port 0)
if [ "$mine" = "${head%:*}" ]; then
    options+=(--head --port "${head##*:}" --include-dashboard=false)
else
    options+=(--address "$head")
fi
# what SLURM gave this job on this node, not what the node has
[ -z "${SLURM_CPUS_ON_NODE:-}" ] || options+=(--num-cpus "$SLURM_CPUS_ON_NODE")
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || options+=(--num-gpus "$SLURM_GPUS_ON_NODE")

export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when this ends, the command has: there is nothing to drain
ray start "${options[@]}" >"$scratch/start.log" 2>&1 </dev/null &
ray_pid=$!
exec {leash}<&0
cat <&"$leash" >/dev/null &
leash_pid=$!
trap 'kill -TERM "$leash_pid" 2>/dev/null || true' TERM INT
trap '' USR1
while kill -0 "$ray_pid" 2>/dev/null && kill -0 "$leash_pid" 2>/dev/null; do wait -n "$ray_pid" "$leash_pid" || true; done

if kill -0 "$ray_pid" 2>/dev/null; then
    kill -TERM "$ray_pid"
    while kill -0 "$ray_pid" 2>/dev/null; do wait "$ray_pid" || true; done
    exit 0
fi
kill -TERM "$leash_pid" 2>/dev/null || true
echo "node.sh: Ray on $SLURMD_NODENAME ended on its own; the ends of its logs:" >&2
for log in "$scratch"/start.log "$scratch"/session_latest/logs/{gcs_server,raylet}.{out,err}; do
    [ ! -s "$log" ] || { echo "--- ${log##*/}" && tail -n 15 "$log"; } >&2
done
exit 1
