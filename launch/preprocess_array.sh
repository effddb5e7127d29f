#!/usr/bin/env bash
# Prepares a corpus as a job array, and merges it when all tasks are done. Arguments are those of `kosmos preprocess`:
#   TASKS=32 bash launch/preprocess_array.sh captions --input shards/*.tar --output data/captions --tokenizer data/tokenizer
#   TASKS=32 bash launch/preprocess_array.sh --dry-run text --input corpus/*.jsonl --output data/text --tokenizer data/tokenizer
# Variables besides those of env.example.sh, of which NODES and GPUS don't count here:
#   TASKS      tasks of the array (16)
#   CPUS       CPUs of a task (8): give --workers 8, too
#   MEMORY     memory of a task (16G)
# A task that is lost goes on where its finished parts end; so does the same command, submitted again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
source "$ROOT/launch/commands.sh"
if [[ ${1:-} = --dry-run ]]; then
  DRY_RUN=1
  shift
fi
case ${1:-} in
  text | captions | interleaved) ;;
  *)
    sed -n '2,/^set /s/^# \?//p' "$0"
    exit 2
    ;;
esac
load_settings
: "${TASKS:=16}" "${CPUS:=8}" "${MEMORY:=16G}"
check_number TASKS 1
check_number CPUS 1

# The corpus and whether it may be replaced are what the merge has to know, too.
OUTPUT='' MERGE=()
arguments=("$@")
for ((i = 1; i < $#; i++)); do
  case ${arguments[i]} in
    --output) OUTPUT=${arguments[i + 1]:-} ;;
    --output=*) OUTPUT=${arguments[i]#--output=} ;;
    --overwrite) MERGE=(--overwrite) ;;
    --shard-index* | --num-shards*) die "${arguments[i]} is this script's business: set TASKS" ;;
  esac
done
[[ -n $OUTPUT ]] || die "--output PREFIX is missing"

container_commands
job_options
NAME=kosmos-preprocess-$(basename "$OUTPUT")
JOB+=(--requeue --nodes=1 --ntasks=1 "--cpus-per-task=$CPUS" "--mem=$MEMORY" "--time=$TIME" "--chdir=$PWD")
STEP=(exec srun --ntasks=1 --cpu-bind=none "${PYXIS[@]}" "${INSIDE[@]}" "$PYTHON" -m megatron_kosmos preprocess)
task=$(show "${STEP[@]}" "$@")
merge=$(show "${STEP[@]}" merge --output "$OUTPUT" "${MERGE[@]}")
# shellcheck disable=SC2016  # expanded in the job
ARRAY=(
  sbatch "${JOB[@]}" "--job-name=$NAME" "--array=0-$((TASKS - 1))" "--output=$OUTPUT.logs/%a-%A.out"
  "--wrap=$task --shard-index \$SLURM_ARRAY_TASK_ID --num-shards $TASKS"
)
AFTER=(sbatch "${JOB[@]}" "--job-name=$NAME-merge" "--output=$OUTPUT.logs/merge-%j.out" --kill-on-invalid-dep=yes)

if [[ ${DRY_RUN:-0} = 1 ]]; then
  show "${ARRAY[@]}"
  show "${AFTER[@]}" --dependency=afterok:ARRAY_ID "--wrap=$merge"
  exit
fi
mkdir -p "$OUTPUT.logs"
array=$("${ARRAY[@]}")
array=${array%%;*}
after=$("${AFTER[@]}" "--dependency=afterok:$array" "--wrap=$merge")
echo "array $array: $TASKS tasks, logs in $OUTPUT.logs; merged by job ${after%%;*} when all of them are done"
