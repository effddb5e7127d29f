# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are for the functions of commands.sh
# How the training scripts read their arguments, and submit the job or print it.

# read_arguments ARGUMENT...: --dry-run, and settings of the run, which MORE gets.
read_arguments() {
  local argument
  MORE=()
  for argument; do
    case $argument in
      --dry-run) DRY_RUN=1 ;;
      -h | --help)
        sed -n '2,/^set /s/^# \?//p' "$0"
        exit 0
        ;;
      [a-z]*=*) MORE+=("$argument") ;;
      *) die "unknown argument $argument: --dry-run, or settings of the run, a.b=c" ;;
    esac
  done
}

# print_training: what the job runs, of which only the names of nodes and the port are not known before.
print_training() {
  echo '# in the job, on all nodes:'
  steps
  [[ $PREFLIGHT = 0 ]] || show "${PREFLIGHT_STEP[@]}"
  show "${TRAINING_STEP[@]}"
  echo '# which on each node, here the first, is:'
  HEAD_NODE=HEAD_NODE NODE_NAMES=NODE_NAMES ATTEMPT=JOB_ID.RESTARTS
  : "${HEAD_PORT:=HEAD_PORT}"
  node_commands
  [[ $PREFLIGHT = 0 ]] || show "${PREFLIGHT_COMMAND[@]}"
  show "${TRAINING_COMMAND[@]}"
}

# submit_training: submit the job, CHAIN times, or print what would be submitted and run.
submit_training() {
  local link job
  ((${#MORE[@]} == 0)) || OVERRIDES+=$(printf " %q" "${MORE[@]}")
  training_job
  if [[ ${DRY_RUN:-0} = 1 ]]; then
    for ((link = 1; link <= CHAIN; link++)); do show env "CHAIN_LINK=$link" "${SUBMIT[@]}"; done
    print_training
    return
  fi
  mkdir -p "$RUN_DIR/logs" || die "RUN_DIR=$RUN_DIR cannot be made"
  command -v sbatch >/dev/null || die "no sbatch here: run it where jobs are submitted, or look with --dry-run"
  for ((link = 1; link <= CHAIN; link++)); do
    job=$(CHAIN_LINK=$link "${SUBMIT[@]}")
    echo "job ${job%%;*} ($link of $CHAIN): log in $RUN_DIR/logs/$JOB_NAME-${job%%;*}.out"
  done
}
