#!/usr/bin/env bash
# What srun's one task on a node does: `node.sh preflight` checks it, `node.sh train` starts its ranks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
source "$ROOT/launch/commands.sh"
load_settings
node_commands
cd "$ROOT"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  threads=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / GPUS_PER_NODE))
  export OMP_NUM_THREADS=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
fi
case ${1:-} in
  preflight) exec "${PREFLIGHT_COMMAND[@]}" ;;
  train)
    # An ignored signal stays so in what is started: the launcher outlives it, and the ranks set their own handlers.
    trap '' USR1 TERM
    # Launchers leave files behind when they are killed: here they have a folder, which the next start of the job clears.
    : "${TMPDIR:=/tmp}"
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$TMPDIR/torchinductor_$(id -un)} # this one may stay
    rm -rf "$TMPDIR/kosmos-${ATTEMPT%.*}."*"-${SLURM_NODEID:-0}"
    export TMPDIR=$TMPDIR/kosmos-$ATTEMPT-${SLURM_NODEID:-0}
    mkdir -p "$TMPDIR"
    code=0
    "${TRAINING_COMMAND[@]}" || code=$?
    rm -rf "$TMPDIR"
    exit "$code"
    ;;
  *) die "usage: node.sh preflight|train, as a task of the job" ;;
esac
