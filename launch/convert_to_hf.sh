#!/usr/bin/env bash
# Exports a run's newest checkpoint to Hugging Face: on this machine, in an allocation, or as a job.
#   RUN_DIR=runs/kosmos1_64gpu bash launch/convert_to_hf.sh exported          here, or in the allocation it is called in
#   SUBMIT=1 RUN_DIR=… bash launch/convert_to_hf.sh exported                  as a job without GPUs
#   bash launch/convert_to_hf.sh --dry-run exported --format kosmos2          print what would be submitted and run
# The first argument is the folder to make, the others are options of `kosmos convert to-hf`. INPUT takes the place of
# RUN_DIR for a single checkpoint folder. Variables besides those of env.example.sh: CPUS (8) and MEMORY (64G) of the job.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
source "$ROOT/launch/commands.sh"
if [[ ${1:-} = --dry-run ]]; then
  DRY_RUN=1
  shift
fi
[[ -n ${1:-} && $1 != -* ]] || {
  sed -n '2,/^set /s/^# \?//p' "$0"
  exit 2
}
load_settings
: "${INPUT:=$RUN_DIR}" "${CPUS:=8}" "${MEMORY:=64G}"
container_commands
CONVERT=("${INSIDE[@]}" "$PYTHON" -m megatron_kosmos convert to-hf "$INPUT" "$@")
STEP=(srun --nodes=1 --ntasks=1 --cpu-bind=none "${PYXIS[@]}" "${CONVERT[@]}")
if [[ ${SUBMIT:-0} = 1 ]]; then
  job_options
  JOB+=(--nodes=1 --ntasks=1 "--cpus-per-task=$CPUS" "--mem=$MEMORY" "--time=$TIME" "--chdir=$PWD")
  run sbatch "${JOB[@]}" --job-name=kosmos-convert "--output=$1.log" "--wrap=exec $(show "${STEP[@]}")"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  run "${STEP[@]}"
elif [[ ${#PYXIS[@]} = 0 ]]; then
  run "${CONVERT[@]}"
else
  die "CONTAINER=$CONTAINER needs Pyxis, which runs inside a job: use SUBMIT=1, salloc, or an Apptainer image (.sif)"
fi
