#!/usr/bin/env bash
# Submits the pre-training of KOSMOS-1 on 8 nodes of 8 GPUs; with other NODES, GPUS_PER_NODE and CONFIG, any training.
#   bash launch/pretrain_kosmos_64gpu.sh             submit; settings are in launch/env.sh (see env.example.sh)
#   bash launch/pretrain_kosmos_64gpu.sh --dry-run   print what would be submitted and run
# More arguments are settings of the run, besides OVERRIDES: training.steps=1000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
source "$ROOT/launch/commands.sh"
source "$ROOT/launch/submission.sh"
read_arguments "$@"
load_settings
submit_training
