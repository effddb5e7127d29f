#!/usr/bin/env bash
# Pre-trains on one node of 8 GPUs: on this machine, or on the first node of the allocation that it is called in (salloc).
#   bash launch/pretrain_kosmos_8gpu.sh              train here; settings are in launch/env.sh (see env.example.sh)
#   SUBMIT=1 bash launch/pretrain_kosmos_8gpu.sh     submit it as a job, which requeues as the 64-GPU one does
#   bash launch/pretrain_kosmos_8gpu.sh --dry-run    print what would be submitted and run
# More arguments are settings of the run, besides OVERRIDES: training.steps=1000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
source "$ROOT/launch/commands.sh"
source "$ROOT/launch/submission.sh"
read_arguments "$@"
# One node needs no tensor or pipeline ranks: every GPU holds the whole model.
export NODES=1 LAYOUT=dp
[[ -n ${RUN_DIR:-} || -n ${CONFIG:-} ]] || RUN_DIR=runs/kosmos1_8gpu
load_settings
if [[ ${SUBMIT:-0} = 1 ]]; then
  submit_training
  exit
fi
((${#MORE[@]} == 0)) || OVERRIDES+=$(printf ' %q' "${MORE[@]}")
export OVERRIDES HEAD_NODE=localhost NODE_NAMES=localhost ATTEMPT=here HEAD_PORT=${HEAD_PORT:-29500}
cd "$ROOT"
mkdir -p "$RUN_DIR/logs"
container_commands
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  WHERE=(srun --nodes=1 --ntasks=1 --cpu-bind=none "${PYXIS[@]}")
elif [[ ${#PYXIS[@]} = 0 ]]; then
  WHERE=()
else
  die "CONTAINER=$CONTAINER needs Pyxis, which runs inside a job: use SUBMIT=1, salloc, or an Apptainer image (.sif)"
fi
run "${WHERE[@]}" bash launch/node.sh train
