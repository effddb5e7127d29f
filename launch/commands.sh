# shellcheck shell=bash
# shellcheck disable=SC2034  # the arrays are for the scripts that source this
# The commands that jobs are made of, from the variables of settings.sh. What is printed by --dry-run is what is run.

# show COMMAND...: print a command as one can paste it.
show() {
  printf '%q ' "$@" | sed 's/ $/\n/'
}

# run COMMAND...: run it, or print it with DRY_RUN=1.
run() {
  if [[ ${DRY_RUN:-0} = 1 ]]; then show "$@"; else "$@"; fi
}

# container_commands: fill PYXIS, options of srun, and INSIDE, what stands before a command that runs in the image.
container_commands() {
  PYXIS=() INSIDE=()
  case $CONTAINER in
    '') ;;
    *.sif) INSIDE=(apptainer exec --nv --bind "$MOUNTS" --pwd "$ROOT" "$CONTAINER") ;;
    *) PYXIS=("--container-image=$CONTAINER" "--container-mounts=$MOUNTS" "--container-workdir=$ROOT") ;;
  esac
}

# job_options: fill JOB with the options of sbatch that every job has.
job_options() {
  JOB=(--export=ALL --open-mode=append --parsable)
  [[ -z $PARTITION ]] || JOB+=("--partition=$PARTITION")
  [[ -z $ACCOUNT ]] || JOB+=("--account=$ACCOUNT")
  [[ -z $QOS ]] || JOB+=("--qos=$QOS")
  [[ -z $EXCLUDE ]] || JOB+=("--exclude=$EXCLUDE")
  mapfile -t -O ${#JOB[@]} JOB < <(words "$SBATCH_EXTRA")
}

# gpu_options: fill GPUS with the options of sbatch that ask for whole nodes of GPUs.
gpu_options() {
  # shellcheck disable=SC2153  # both are variables of ours
  GPUS=("--nodes=$NODES" --ntasks-per-node=1 "--gpus-per-node=${GPU_TYPE:+$GPU_TYPE:}$GPUS_PER_NODE" "--time=$TIME")
  if [[ -n $CPUS_PER_NODE ]]; then GPUS+=("--cpus-per-task=$CPUS_PER_NODE"); else GPUS+=(--exclusive --mem=0); fi
}

# training_job: fill SUBMIT with the command that submits the training.
training_job() {
  job_options
  gpu_options
  SUBMIT=(sbatch "${JOB[@]}" "${GPUS[@]}" "--job-name=$JOB_NAME" --dependency=singleton "--signal=B:USR1@$SIGNAL_SECONDS")
  if [[ $REQUEUE = 1 ]]; then SUBMIT+=(--requeue); else SUBMIT+=(--no-requeue); fi
  SUBMIT+=("--chdir=$ROOT" "--output=$RUN_DIR/logs/%x-%j.out" "$ROOT/launch/pretrain.sbatch")
}

# steps: fill PREFLIGHT_STEP and TRAINING_STEP with the commands that the job runs on all of its nodes, one task on each.
steps() {
  container_commands
  # Without --cpu-bind=none a task that asked for no CPUs is bound to one core, and all ranks of the node with it.
  local every=(srun --ntasks-per-node=1 --cpu-bind=none --label "${PYXIS[@]}")
  PREFLIGHT_STEP=("${every[@]}" --kill-on-bad-exit=0 bash "$ROOT/launch/node.sh" preflight)
  TRAINING_STEP=("${every[@]}" --kill-on-bad-exit=1 --wait=60 bash "$ROOT/launch/node.sh" train)
}

# training_arguments: fill ARGUMENTS with what `kosmos train` is told.
training_arguments() {
  local file
  ARGUMENTS=()
  while read -r file; do ARGUMENTS+=(--config "$file"); done < <(words "$CONFIG")
  ARGUMENTS+=("run_dir=$RUN_DIR")
  mapfile -t -O ${#ARGUMENTS[@]} ARGUMENTS < <(words "$OVERRIDES")
}

# node_commands: fill PREFLIGHT_COMMAND and TRAINING_COMMAND with what a node runs. HEAD_NODE, HEAD_PORT, NODE_NAMES and
# ATTEMPT come from the job, the node's number from SLURM.
node_commands() {
  container_commands
  training_arguments
  local node=${SLURM_NODEID:-0}
  PREFLIGHT_COMMAND=(
    "${INSIDE[@]}" "$PYTHON" -m megatron_kosmos doctor --nodes "$NODES" --gpus "$GPUS_PER_NODE" --run-dir "$RUN_DIR"
    --head "$HEAD_NODE" --port "$HEAD_PORT" --names "$NODE_NAMES"
  )
  mapfile -t -O ${#PREFLIGHT_COMMAND[@]} PREFLIGHT_COMMAND < <(words "$PREFLIGHT_OPTIONS")
  PREFLIGHT_COMMAND+=("${ARGUMENTS[@]}")
  if [[ $LAUNCHER = torchrun ]]; then
    # Ranks are numbered as SLURM orders the nodes, neighbours of the network side by side. TERM must not make torchrun
    # kill ranks that are saving, so it is not among the signals that it handles.
    TRAINING_COMMAND=(
      "${INSIDE[@]}" "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE"
      --node-rank "$node" --rdzv-backend static --rdzv-endpoint "$HEAD_NODE:$HEAD_PORT" --rdzv-id "$ATTEMPT"
      --rdzv-conf "timeout=$START_SECONDS" --max-restarts 0 --signals-to-handle 'SIGINT,SIGHUP,SIGQUIT' -m
    )
  else
    TRAINING_COMMAND=(
      "${INSIDE[@]}" "$PYTHON" -m deepspeed.launcher.runner --hostfile "$RUN_DIR/logs/hostfile" --no_ssh
      --node_rank "$node" --master_addr "$HEAD_NODE" --master_port "$HEAD_PORT" --module
    )
  fi
  TRAINING_COMMAND+=(megatron_kosmos train "${ARGUMENTS[@]}")
}
