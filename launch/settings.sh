# shellcheck shell=bash
# The variables of env.example.sh: read, completed and checked. The scripts of this folder source it.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
VARIABLES=(
  PARTITION ACCOUNT QOS TIME NODES GPUS_PER_NODE GPU_TYPE CPUS_PER_NODE EXCLUDE SBATCH_EXTRA JOB_NAME CHAIN REQUEUE
  SIGNAL_SECONDS MAX_RESTARTS MAX_FAILURES LAYOUT CONFIG RUN_DIR OVERRIDES LAUNCHER HEAD_PORT START_SECONDS PREFLIGHT
  PREFLIGHT_OPTIONS VENV PYTHON CONTAINER MOUNTS
)

die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

read_env_file() {
  local file=${ENV_FILE:-$ROOT/launch/env.sh}
  if [[ -e $file ]]; then
    # shellcheck source=launch/env.example.sh
    source "$file"
  elif [[ -n ${ENV_FILE:-} ]]; then
    die "ENV_FILE=$ENV_FILE is not there; copy launch/env.example.sh"
  fi
}

# words TEXT: its words, a line each; quotes and backslashes as in the shell, but nothing is expanded or run.
words() {
  [[ -z $1 ]] || xargs -r -n 1 printf '%s\n' <<<"$1" || die "unbalanced quotes in: $1"
}

check_number() { # check_number VARIABLE LOWEST
  [[ ${!1} =~ ^[0-9]+$ && $((10#${!1})) -ge $2 ]] || die "$1=${!1} must be a whole number, at least $2"
}

check_choice() { # check_choice VARIABLE VALUE...
  local name=$1 value
  shift
  for value; do [[ ${!name} != "$value" ]] || return 0; done
  die "$name=${!name} must be one of: $*"
}

set_python() {
  if [[ -n $CONTAINER ]]; then
    : "${PYTHON:=${VENV:+$VENV/bin/}python3}"
  else
    : "${VENV:=$ROOT/.venv}" "${PYTHON:=$VENV/bin/python}"
    command -v "$PYTHON" >/dev/null || die "no Python at $PYTHON: run 'make install', or set VENV, PYTHON or CONTAINER"
  fi
}

set_run() {
  local name file
  if [[ -z $CONFIG ]]; then
    case $LAYOUT in
      tp2_pp2) CONFIG=configs/kosmos1_64gpu.yaml ;;
      dp) CONFIG=configs/kosmos1_64gpu_dp.yaml ;;
      *) die "LAYOUT=$LAYOUT must be one of: tp2_pp2 dp" ;;
    esac
  fi
  while read -r file; do
    [[ -f $ROOT/$file || ($file = /* && -f $file) ]] || die "CONFIG: no file $file (paths start in $ROOT)"
    name=$(basename "$file" .yaml)
  done < <(words "$CONFIG")
  : "${RUN_DIR:=runs/$name}"
  [[ $RUN_DIR = /* ]] || RUN_DIR=$ROOT/$RUN_DIR
  : "${JOB_NAME:=kosmos-$(basename "$RUN_DIR")}"
}

# Read the file of settings, fill in what it leaves open, check, and export all for the job.
load_settings() {
  local variable
  read_env_file
  : "${TIME:=24:00:00}" "${NODES:=8}" "${GPUS_PER_NODE:=8}" "${CHAIN:=1}" "${REQUEUE:=1}" "${SIGNAL_SECONDS:=300}"
  : "${MAX_RESTARTS:=100}" "${MAX_FAILURES:=3}" "${LAYOUT:=tp2_pp2}" "${LAUNCHER:=torchrun}" "${START_SECONDS:=900}"
  : "${PREFLIGHT:=1}"
  for variable in "${VARIABLES[@]}"; do
    [[ -v $variable ]] || printf -v "$variable" ''
  done
  for variable in NODES GPUS_PER_NODE CHAIN START_SECONDS; do check_number "$variable" 1; done
  for variable in SIGNAL_SECONDS MAX_RESTARTS MAX_FAILURES; do check_number "$variable" 0; done
  for variable in REQUEUE PREFLIGHT; do check_choice "$variable" 0 1; done
  check_choice LAUNCHER torchrun deepspeed
  for variable in CONFIG OVERRIDES SBATCH_EXTRA PREFLIGHT_OPTIONS; do words "${!variable}" >/dev/null; done
  set_run
  set_python
  : "${MOUNTS:=$ROOT:$ROOT$([[ $RUN_DIR/ = "$ROOT"/* ]] || echo ",$RUN_DIR:$RUN_DIR")}"
  export "${VARIABLES[@]}"
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
}
