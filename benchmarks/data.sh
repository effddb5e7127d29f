#!/usr/bin/env bash
# Every benchmark of the data, on real text and photographs of Debian packages: fetched, with a tokenizer, the first time.
# Writes benchmarks/results/*.json. DATA: where all that lies. Wants a quiet machine, an hour of it and 4 GB of disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${DATA:-data/debian}
python=.venv/bin/python
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

$python tools/fetch_debian_corpora.py --output "$data/raw"
for package in mate-backgrounds lomiri-wallpapers-16.04 ukui-wallpapers; do
    folder=$data/photographs/$package
    [[ -d $folder ]] && continue
    rm -rf "$folder.unfinished"
    mkdir -p "$folder.unfinished"
    (cd "$folder.unfinished" && apt-get download -qq "$package" && dpkg -x ./*.deb . && rm ./*.deb)
    mv "$folder.unfinished" "$folder"
done
[[ -f $data/tokenizer/kosmos_tokenizer.json ]] ||
    .venv/bin/kosmos tokenizer train --input "$data"/raw/text/*.jsonl --output "$data/tokenizer" --vocab-size 8000

prepare() { # KIND NAME INPUTS AND OPTIONS: for sequences of 2,048 with 64 slots a picture
    $python tools/preprocess_data.py "$1" --output "$data/bench/$2" --tokenizer "$data/tokenizer" "${@:3}"
}
prepare text text --input "$data"/raw/text/*.jsonl
prepare captions captions --input "$data/raw/stamps/captions.jsonl"
prepare interleaved interleaved --max-images 5 --min-image-side 64 --drop-single-colour --drop-unusable-images \
    --input "$data"/raw/manual/*.html

$python benchmarks/text_preprocessing.py --tokenizer "$data/tokenizer" --input "$data"/raw/text/*.jsonl
find "$data/photographs" -type f -name '*.jpg' -print0 | sort -z | xargs -0 $python benchmarks/images.py
$python benchmarks/shard_reading.py
$python benchmarks/packing.py --tokenizer "$data/tokenizer" --corpus "$data/bench/text" --corpus "$data/bench/captions" \
    --corpus "$data/bench/interleaved"
$python benchmarks/first_batch.py
