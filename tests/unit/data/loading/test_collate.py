"""Which tokens of a packed row attention may join, and where their positions begin."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.loading.collate import Collator, ImageFormat, RankPart
from megatron_kosmos.data.loading.loader import BatchGeometry, StepLoader, heldout_batches
from megatron_kosmos.data.loading.mixture import Sample
from megatron_kosmos.data.loading.packed_rows import PackedRow
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

IMAGES = ImageFormat(num_latents=4, size=8)
ONE_RANK = BatchGeometry(micro_batch_size=2, global_batch_size=8)
T = 6


@pytest.fixture
def text(
    prepare_corpus: Callable[..., CorpusConfig], write_lines: Callable[[str, Sequence[str]], Path]
) -> CorpusConfig:
    return prepare_corpus("text", write_lines("text.jsonl", [json.dumps({"text": "one " * n}) for n in range(1, 40)]))


@pytest.fixture
def data(
    text: CorpusConfig,
    prepare_blend: Callable[..., tuple[CorpusConfig, ...]],
    tokenizer_folder: Path,
) -> DataConfig:
    """Text, captions and interleaved documents in rows of 64 tokens, under document masks."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "caption": [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(12)],
        "interleaved": [
            {"parts": [{"text": "see"}, {"image": f"{number}.png"}, {"text": "and on " * number}]}
            for number in range(12)
        ],
    }
    corpora = prepare_blend(lines, 12)
    return DataConfig(
        tokenizer=tokenizer_folder,
        sequence_length=64,
        train=(text, *corpora),
        heldout=(corpora[0],),
        document_mask=True,
        num_workers=0,
    )


def row(*document_ids: int) -> PackedRow:
    zeros = np.zeros(len(document_ids), dtype=np.int64)
    return PackedRow(zeros, zeros, zeros.astype(np.bool_), np.array(document_ids, dtype=np.int32), (), ())


@pytest.fixture
def collate(text: CorpusConfig, tokenizer: KosmosTokenizer) -> Callable[..., MultimodalBatch]:
    """Makes a batch of rows of text."""

    def make(rows: Sequence[PackedRow], mask_documents: bool = True) -> MultimodalBatch:
        corpora = [Corpus(text, tokenizer)]
        collator = Collator(corpora, IMAGES, part=RankPart(), stop_at_bad_image=True, mask_documents=mask_documents)
        return collator([Sample(0, one, number) for number, one in enumerate(rows)]).unwrap()

    return make


@pytest.mark.parametrize(
    "rows, starts, positions",
    [
        ([(0, 0, 1, 1, 1, 2)], [0, 2, 5, 6], [[0, 1, 0, 1, 2, 0]]),
        ([(0, 0, 0, 0, -1, -1)], [0, 4, 6], [[0, 1, 2, 3, 0, 1]]),
        ([(0, 0, 0, 0, 0, 0)], [0, 6], [[0, 1, 2, 3, 4, 5]]),
        # The second row goes on with the document that the first one cut: it begins anew all the same.
        ([(0, 0, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)], [0, 2, 6, 12], [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
        (
            [(0,) * T, (0, 1, 1, 1, 1, -1), (0,) * T],
            [0, 6, 7, 11, 12, 18],
            [[*range(6)], [0, 0, 1, 2, 3, 0], [*range(6)]],
        ),
    ],
)
def test_segments_are_documents_and_padding(
    collate: Callable[..., MultimodalBatch], rows: list[tuple[int, ...]], starts: list[int], positions: list[list[int]]
) -> None:
    batch = collate([row(*ids) for ids in rows])
    assert batch.document_starts.tolist() == starts
    assert batch.document_starts.dtype == torch.int32
    assert batch.position_ids.tolist() == positions
    assert batch.position_ids.dtype == torch.int64
    assert batch.masks_documents == (len(starts) > len(rows) + 1)


def test_plain_packing_has_a_segment_for_each_row(collate: Callable[..., MultimodalBatch]) -> None:
    batch = collate([row(0, 0, 1, 1, 2, -1), row(*[0] * T)], mask_documents=False)
    assert batch.document_starts.tolist() == [0, 6, 12]
    assert batch.position_ids.tolist() == [[*range(6)]] * 2
    assert not batch.masks_documents


def read(data: DataConfig) -> list[MultimodalBatch]:
    return [batch for step in StepLoader(data, IMAGES, ONE_RANK, seed=3).steps(0, 6) for batch in step]


def test_real_rows_are_cut_at_each_beginning_and_nowhere_else(data: DataConfig, tokenizer: KosmosTokenizer) -> None:
    """Documents begin with <s>; padding and the rest of a document that the row before cut begin without it."""
    batches = read(data)
    num_cut = 0
    for batch in batches:
        starts = batch.document_starts.tolist()
        ids = batch.input_ids.flatten().tolist()
        assert starts[-1] == len(ids)
        begins = {place for place, token in enumerate(ids) if token == tokenizer.bos_id}
        assert begins <= set(starts)
        for start, stop in pairwise(starts):
            assert batch.position_ids.flatten()[start:stop].tolist() == list(range(stop - start))
            if start not in begins and start % 64:
                assert set(ids[start:stop]) == {tokenizer.pad_id}
                assert stop % 64 == 0
                assert not batch.loss_mask.flatten()[start:stop].any()
            num_cut += start not in begins and start % 64 == 0
        assert set(range(0, 129, 64)) <= set(starts)
    assert num_cut, "no row began in the middle of a document"


def test_a_picture_lies_within_one_segment(data: DataConfig, tokenizer: KosmosTokenizer) -> None:
    num_pictures = 0
    for batch in read(data):
        segment = torch.arange(len(batch.document_starts) - 1).repeat_interleave(batch.document_starts.diff())
        for number, column in batch.image_positions.tolist():
            block = slice(number * 64 + column - 1, number * 64 + column + IMAGES.num_latents + 1)  # with its markers
            assert batch.input_ids.flatten()[block][[0, -1]].tolist() == [tokenizer.image_id, tokenizer.end_of_image_id]
            assert len(segment[block].unique()) == 1
            num_pictures += 1
    assert num_pictures > 20


def test_no_target_asks_for_the_next_document(data: DataConfig, tokenizer: KosmosTokenizer) -> None:
    for batch in read(data):
        last = batch.document_starts[1:].long() - 1
        inner = last[(last + 1) % 64 != 0]
        assert not batch.loss_mask.flatten()[inner].any()


def test_tokens_are_those_of_plain_packing(data: DataConfig) -> None:
    for masked, plain in zip(read(data), read(data.model_copy(update={"document_mask": False})), strict=True):
        for field in ("input_ids", "labels", "loss_mask", "images", "image_positions", "sources"):
            assert torch.equal(getattr(masked, field), getattr(plain, field)), field
        assert plain.document_starts.tolist() == [0, 64, 128]
        assert plain.position_ids.tolist() == [list(range(64))] * 2


def test_heldout_rows_are_masked_like_training_rows(data: DataConfig) -> None:
    (corpus,) = data.heldout
    steps = heldout_batches(data, corpus, IMAGES, ONE_RANK, 4)
    batches = [batch for step in steps for batch in step]
    assert any(batch.masks_documents for batch in batches)
    for batch in batches:
        assert (batch.position_ids.flatten()[batch.document_starts[:-1].long()] == 0).all()
