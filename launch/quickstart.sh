#!/usr/bin/env bash
# Trains, evaluates and exports a tiny KOSMOS on real data, on the CPU, by the same commands that a large run takes.
# What is there already is reused: delete the output folder to start again.
#   SEED    seed of data split, weights and order (1)
#   OUTPUT  folder of everything that is written (runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SEED=${SEED:-1}
OUTPUT=${OUTPUT:-runs/quickstart}
bin=.venv/bin
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

corpora=()
for split in train heldout; do
  index=0
  for kind in text captions interleaved; do
    corpora+=("data.$split.$index.prefix=$OUTPUT/data/${kind}_$split")
    index=$((index + 1))
  done
done
settings=("run_dir=$OUTPUT" "data.tokenizer=$OUTPUT/data/tokenizer" "training.seed=$SEED" "${corpora[@]}")

prepare() { # what else the corpus is made of: kind, split, input
  [[ -f $OUTPUT/data/$1_$2.manifest.json ]] ||
    "$bin/python" tools/preprocess_data.py "$1" --input "$3" --output "$OUTPUT/data/$1_$2" \
      --tokenizer "$OUTPUT/data/tokenizer" --sequence-length 128 --num-latents 8
}

if [[ ! -f $OUTPUT/summary.json ]]; then
  started=$SECONDS

  say "Real data: handwritten digits and Python's reference manual"
  [[ -f $OUTPUT/raw/corpora.yaml ]] ||
    "$bin/python" tools/quickstart_data.py --output "$OUTPUT/raw" --seed "$SEED"
  [[ -d $OUTPUT/data/tokenizer ]] ||
    "$bin/kosmos" tokenizer train --input "$OUTPUT/raw/tokenizer.txt" --output "$OUTPUT/data/tokenizer" --vocab-size 1024
  for split in train heldout; do
    prepare text "$split" "$OUTPUT/raw/text_$split.jsonl"
    prepare interleaved "$split" "$OUTPUT/raw/interleaved_$split.jsonl"
  done
  prepare captions train "$OUTPUT/raw/captions_train.tar"
  prepare captions heldout "$OUTPUT/raw/captions_heldout.jsonl"

  say "Training on two pipeline stages, the vision tower on the first"
  "$bin/torchrun" --standalone --nproc-per-node 2 -m megatron_kosmos train --config configs/kosmos_tiny.yaml \
    parallel.pipeline_parallel_size=2 "${settings[@]}"

  say "Export to Hugging Face, compared with the training model"
  [[ -f $OUTPUT/hf/conversion.json ]] || "$bin/kosmos" convert to-hf "$OUTPUT" "$OUTPUT/hf"

  say "Evaluation of the export on held-out data"
  "$bin/kosmos" evaluate --model "$OUTPUT/hf" --config "$OUTPUT/config.yaml" --output "$OUTPUT/evaluation.json"

  "$bin/python" tools/quickstart_summary.py --run "$OUTPUT" --seconds $((SECONDS - started))
fi

say "A held-out digit, captioned by the export"
read -r picture caption < <("$bin/python" -c '
import json, sys
line = json.loads(open(sys.argv[1] + "/raw/captions_heldout.jsonl").readline())
print(sys.argv[1] + "/raw/" + line["image"], line["caption"])' "$OUTPUT")
echo "$picture shows $caption. The model says:"
"$bin/kosmos" generate --model "$OUTPUT/hf" --image "$picture" --prompt ""

say "Done"
cat "$OUTPUT/summary.json"
cat <<END

metrics       $OUTPUT/metrics.jsonl, and: $bin/tensorboard --logdir $OUTPUT/tensorboard
checkpoints   $OUTPUT/checkpoints
export        $OUTPUT/hf
captions      $OUTPUT/captions.png
END
