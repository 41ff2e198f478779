#!/bin/bash
# One node's part of a job:  node.sh HEAD:PORT NODES CONFIG [dotted.key=value ...]
# Ray comes up on every node; the first node, the head, then runs `ctpo train`, whose exit code is the job's.
set -uo pipefail
head=$1 nodes=$2
shift 2
# as far as this node allows: InfiniBand wants locked memory, Ray open files
ulimit -S -l "$(ulimit -H -l)"
most=$(ulimit -H -n)
{ [ "$most" != unlimited ] && [ "$most" -lt 65536 ]; } || most=65536
[ "$(ulimit -S -n)" = unlimited ] || [ "$(ulimit -S -n)" -ge "$most" ] || ulimit -S -n "$most"
scratch=$(mktemp -d "/tmp/ray-$SLURM_JOB_ID-XXXXXX") || exit # short, since Unix sockets live below it
trap 'rm -rf "$scratch"' EXIT

ray=(ray symmetric-run --address "$head" --min-nodes "$nodes" "--temp-dir=$scratch" --disable-usage-stats)
# what SLURM gave this job on this node, not what the node has
[ -z "${SLURM_CPUS_ON_NODE:-}" ] || ray+=("--num-cpus=$SLURM_CPUS_ON_NODE")
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || ray+=("--num-gpus=$SLURM_GPUS_ON_NODE")
# leaves a mark when it runs: symmetric-run exits with 0 also where Ray itself did not start
ray+=(-- bash -c 'touch "$0" && exec "$@"' "$scratch/ran" ctpo train "$@" cluster.address=auto)

if [ "$SLURM_PROCID" -eq 0 ]; then
    "${ray[@]}" || exit
    [ -e "$scratch/ran" ]
else
    trap 'exit 0' TERM # so SLURM ends this node when the head has failed
    "${ray[@]}" >"$scratch/log" 2>&1
    # Ray reports the head's end at length, as an error; that is how every run ends. All else is shown, and ends the job.
    grep -q 'Failed to connect to GCS' "$scratch/log" || { cat "$scratch/log" >&2 && exit 1; }
fi
