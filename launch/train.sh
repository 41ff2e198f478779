#!/bin/bash
# `ctpo train CONFIG [dotted.key=value ...]` on a SLURM allocation; goes on from the newest checkpoint after a requeue.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v ctpo >/dev/null || PATH=$(cd "$here/../.venv/bin" && pwd):$PATH # an activated environment wins

# also refuses a wrong configuration before anything is started
run_dir=$(python "$here/run_dir.py" "$@")

flags=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && compgen -G "$run_dir/checkpoints/step_*" >/dev/null; then
    flags=(--resume)
fi
exec "$here/run.sh" ctpo train "${flags[@]}" "$@" cluster.address=auto
