"""The manifest says how well each way of packing fills rows: what rows that are really read have in them."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.corpora.manifest import SUFFIX, path_with, read_manifest
from megatron_kosmos.data.hashing import shuffled
from megatron_kosmos.data.loading.packed_rows import Packer
from megatron_kosmos.data.packing.planning import ImagePlaces
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.packing.summary import PackingSummary, summarize_packing
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.packing.made_corpora import PICTURE, Parts, make_corpus

FORMAT = RowFormat(sequence_length=64, num_latents=4)


def documents(kind: SourceKind) -> list[Parts]:
    """A caption of 40 words and a picture, long texts now and then, pages with up to three pictures."""
    lengths = np.random.default_rng(0).integers(1, 40, 60).tolist()
    made: list[Parts] = []
    for number, length in enumerate(lengths):
        words: Parts = [7] * (length * (4 if number % 10 == 0 and kind != "caption" else 1))
        pictures: Parts = [PICTURE] * {"text": 0, "caption": 1, "interleaved": number % 4}[kind]
        made.append(pictures[:1] + words + pictures[1:])
    return made


@pytest.mark.parametrize("kind", get_args(SourceKind))
def test_the_figures_are_those_of_the_rows(kind: SourceKind, tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, kind, documents(kind), tokenizer)
    packer = Packer(corpus, FORMAT, tokenizer, skip_misfits=False)
    store = corpus.images
    places = None if store is None else ImagePlaces(store.first_images, store.positions)
    summaries = summarize_packing(kind, corpus.lengths, places, FORMAT)
    assert list(summaries) == list(get_args(Packing))
    for packing, summary in summaries.items():
        plan = packer.plan(shuffled(len(corpus), 0), packing)
        filled = sum(int((packer.row(plan, row).document_ids >= 0).sum()) for row in range(plan.num_rows))
        assert summary == PackingSummary(
            rows=plan.num_rows, efficiency=filled / (plan.num_rows * 64), documents_cut=plan.count_cut_documents()
        )
    if kind == "caption":
        assert not any(summary.documents_cut for summary in summaries.values())
    else:
        assert summaries["concatenate"].documents_cut > summaries["best_fit"].documents_cut > 0
    assert summaries["best_fit_decreasing"].rows <= summaries["best_fit"].rows


def test_a_prepared_corpus_has_them_and_one_from_before_is_read(tokenizer_folder: Path, tmp_path: Path) -> None:
    source, prefix = tmp_path / "text.jsonl", tmp_path / "corpus"
    source.write_text("".join(json.dumps({"text": "a b c " * (number % 9 + 1)}) + "\n" for number in range(30)))
    manifest = prepare(Preparation("text", (source,), prefix, tokenizer_folder, row_format=FORMAT))
    corpus = Corpus(CorpusConfig(kind="text", prefix=prefix), KosmosTokenizer.load(tokenizer_folder))
    assert manifest.packing == summarize_packing("text", corpus.lengths, None, FORMAT)
    assert read_manifest(prefix) == manifest
    path = path_with(prefix, SUFFIX)
    fields = json.loads(path.read_text())
    del fields["packing"]
    path.write_text(json.dumps(fields))
    assert read_manifest(prefix).packing == {}
