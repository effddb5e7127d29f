# shellcheck shell=bash
# Settings of your cluster: the one file to edit. Copy it to launch/env.sh (git ignores that), take away the '#' before a
# line and change its value. The scripts of this folder read it when they submit, and again on every node before
# anything starts there, so `module load` and exports for NCCL belong here too. A variable that is set when a script is
# called wins: NODES=4 bash launch/pretrain_kosmos_64gpu.sh. Every line shows the default. More: docs/slurm.md.
# Hyperparameters are in configs/, not here.

# --- SLURM -----------------------------------------------------------------------------------------------------------
#: "${PARTITION:=}"             # partition; empty: the cluster's default
#: "${ACCOUNT:=}"               # account that pays; empty: yours
#: "${QOS:=}"                   # quality of service
#: "${TIME:=24:00:00}"          # time limit of one job; the run goes on in the next one
#: "${NODES:=8}"                # nodes (the 8-GPU script: 1)
#: "${GPUS_PER_NODE:=8}"
#: "${GPU_TYPE:=}"              # such as h100, where the cluster asks for a type: --gpus-per-node=h100:8
#: "${CPUS_PER_NODE:=}"         # CPUs to ask for on each node; empty: whole nodes (--exclusive)
#: "${EXCLUDE:=}"               # nodes not to use: node13,node27
#: "${SBATCH_EXTRA:=}"          # further options of sbatch: "--constraint=ib --mail-type=END"
#: "${JOB_NAME:=}"              # empty: kosmos-RUN; jobs of the same name and user run one after the other
#: "${CHAIN:=1}"                # jobs to submit; each goes on where the one before it ended
#: "${REQUEUE:=1}"              # 0: never put the job back into the queue; use CHAIN then
#: "${SIGNAL_SECONDS:=300}"     # how long before the time limit the run saves and stops
#: "${MAX_RESTARTS:=100}"       # times that one job may be put back into the queue, whatever the reason
#: "${MAX_FAILURES:=3}"         # failures in a row, without a new checkpoint between them, after which it isn't

# --- The run ---------------------------------------------------------------------------------------------------------
#: "${LAYOUT:=tp2_pp2}"         # of the 64-GPU script: tp2_pp2 is configs/kosmos1_64gpu.yaml, dp kosmos1_64gpu_dp.yaml
#: "${CONFIG:=}"                # another YAML, or several that change each other: "configs/modern.yaml mine.yaml"
#: "${RUN_DIR:=}"               # folder of the run, shared by all nodes; empty: runs/NAME_OF_CONFIG
#: "${OVERRIDES:=}"             # settings to change: "training.steps=1000 data.num_workers=8"; quotes as in the shell
#: "${LAUNCHER:=torchrun}"      # what starts the ranks of a node: torchrun or deepspeed
#: "${HEAD_PORT:=}"             # port on the first node; empty: from the job's number, between 20000 and 29999
#: "${START_SECONDS:=900}"      # how long nodes wait for each other at the start
#: "${PREFLIGHT:=1}"            # 0: don't check nodes before training
#: "${PREFLIGHT_OPTIONS:=}"     # options of kosmos doctor: "--timeout 120"

# --- Python ----------------------------------------------------------------------------------------------------------
#: "${VENV:=}"                  # virtual environment; empty: .venv of this folder
#: "${PYTHON:=}"                # interpreter; empty: VENV/bin/python, python3 in a container
#: "${CONTAINER:=}"             # image: FILE.sif runs by Apptainer; anything else by Pyxis (FILE.sqsh, registry#image:tag)
#: "${MOUNTS:=}"                # A:A,B:B, folders that the container sees; empty: this folder and RUN_DIR. Add your data
# module load cuda

# --- Threads, memory and network (docs/slurm.md says when to change what) ------------------------------------------------
#export OMP_NUM_THREADS=8                             # unset: CPUs of a node / GPUs of a node, at most 8
#export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
#export NCCL_SOCKET_IFNAME=eth0                       # interface for NCCL's start-up, where it guesses a wrong one
#export GLOO_SOCKET_IFNAME=eth0                       # the same for gloo
#export NCCL_IB_HCA=mlx5                              # InfiniBand adapters, where there are others that must not be used
#export NCCL_DEBUG=WARN                               # INFO: which interfaces and adapters NCCL took
