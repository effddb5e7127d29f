"""Rows cut no picture, hold every token of the epoch once, and count in the loss what is text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.loading.packed_rows import PackedRow, Packer
from megatron_kosmos.data.packing.cutting import cut_rows
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from tests.unit.data.packing.made_corpora import (
    BOS,
    END,
    EOS,
    IMAGE,
    PAD,
    PICTURE,
    Parts,
    folder_in_memory,
    make_corpus,
    stream_of,
)

parts = st.lists(st.one_of(st.integers(7, 399), st.just(PICTURE)), max_size=20)


def content(row: PackedRow) -> NDArray[np.bool_]:
    """Return which columns hold tokens; they come before the padding."""
    is_content: NDArray[np.bool_] = row.document_ids >= 0
    assert not np.any(np.diff(is_content.astype(int)) > 0)
    return is_content


@settings(max_examples=150)
@given(
    documents=st.lists(parts, min_size=1, max_size=12),
    num_latents=st.integers(1, 5),
    extra_length=st.integers(0, 40),
    kind=st.sampled_from(["caption", "interleaved", "text"]),
    data=st.data(),
)
def test_rows_are_the_stream_with_no_picture_cut(
    tokenizer: KosmosTokenizer,
    documents: list[Parts],
    num_latents: int,
    extra_length: int,
    kind: Any,
    data: st.DataObject,
) -> None:
    if kind == "text":
        documents = [[part for part in document if isinstance(part, int)] for document in documents]
    most = max(document.count(PICTURE) for document in documents)
    length = max(2 + most * (num_latents + 2), 3) + extra_length
    order = data.draw(st.permutations(range(len(documents))))
    ordered = [documents[number] for number in order]
    with folder_in_memory() as folder:
        corpus = make_corpus(Path(folder), kind, documents, tokenizer)
        row_format = RowFormat(sequence_length=length, num_latents=num_latents)
        packer = Packer(corpus, row_format, tokenizer, skip_misfits=False)
        plan = packer.plan(np.array(order))
        rows = [packer.row(plan, number) for number in range(plan.num_rows)]
    stream = stream_of(ordered, num_latents)
    place = 0
    numbers: list[int] = []
    for row in rows:
        stored = content(row)
        size = int(stored.sum())
        here = stream[place : place + size]
        assert row.input_ids.shape == row.labels.shape == row.loss_mask.shape == row.document_ids.shape == (length,)
        assert row.input_ids[stored].tolist() == [number for number, _, _ in here]
        assert np.all(row.input_ids[~stored] == PAD)
        # Document numbers count from 0 in each row.
        assert row.document_ids[stored].tolist() == [document - here[0][2] for _, _, document in here]
        # A label is the next token of the stream, and counts if it is text and the row is not padded before it.
        following = stream[place + 1 : place + size + 1]
        if size < length:
            following = following[: size - 1]
        assert row.labels[: len(following)].tolist() == [number for number, _, _ in following]
        counts = [is_text for _, is_text, _ in following]
        assert row.loss_mask.tolist() == counts + [False] * (length - len(counts))
        # Blocks are whole: `<image>`, its slots, `</image>`.
        starts = np.flatnonzero(row.input_ids == IMAGE)
        assert [column - 1 for column in row.image_columns] == starts.tolist()
        assert all(row.input_ids[start + num_latents + 1] == END for start in starts)
        numbers += row.images
        place += size
        # A row ends early only before something that may not be cut.
        if size < length and place < len(stream):
            assert stream[place][0] in ((BOS, IMAGE) if kind == "caption" else (IMAGE,))
    assert place == len(stream)
    assert numbers == [number for document in order for number in corpus.images_of(document)]
    # No text token is lost between rows: a row is padded only where no text follows.
    assert sum(int(row.loss_mask.sum()) for row in rows) == sum(is_text for _, is_text, _ in stream)


def test_a_caption_stays_with_its_picture(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    documents: list[Parts] = [[PICTURE, 10, 11, 12] for _ in range(6)]
    corpus = make_corpus(tmp_path, "caption", documents, tokenizer)
    packer = Packer(corpus, RowFormat(sequence_length=20, num_latents=2), tokenizer, skip_misfits=False)
    plan = packer.plan(packer.documents)
    rows = [packer.row(plan, number) for number in range(plan.num_rows)]
    assert [row.input_ids[0] for row in rows] == [BOS] * 3
    assert [row.image_columns for row in rows] == [(2, 11)] * 3


def test_a_worked_example(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, "interleaved", [[10, PICTURE, 11], [12, PICTURE]], tokenizer)
    packer = Packer(corpus, RowFormat(sequence_length=8, num_latents=2), tokenizer, skip_misfits=False)
    plan = packer.plan(np.array([1, 0]))
    first, second = (packer.row(plan, number) for number in range(plan.num_rows))
    assert first.input_ids.tolist() == [BOS, 12, IMAGE, PAD, PAD, END, EOS, BOS]
    assert first.labels.tolist() == [12, IMAGE, PAD, PAD, END, EOS, BOS, 10]
    assert first.loss_mask.tolist() == [True, False, False, False, False, True, False, True]
    assert first.document_ids.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert (first.images, first.image_columns) == ((1,), (3,))
    assert second.input_ids.tolist() == [10, IMAGE, PAD, PAD, END, 11, EOS, PAD]
    assert second.loss_mask.tolist() == [False, False, False, False, True, True, False, False]
    assert (second.images, second.image_columns) == ((0,), (2,))
    assert second.document_ids.tolist() == [0, 0, 0, 0, 0, 0, 0, -1]


def test_too_many_pictures_for_a_row(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    documents: list[Parts] = [[10], [11, *[PICTURE] * 3], [12, PICTURE]]
    corpus = make_corpus(tmp_path, "interleaved", documents, tokenizer)
    row_format = RowFormat(sequence_length=10, num_latents=2)
    with pytest.raises(
        DataError, match=r"document 1 \(and 0 more\): 3 pictures of 2 slots .* take 14 tokens; .* has 10"
    ):
        Packer(corpus, row_format, tokenizer, skip_misfits=False)
    packer = Packer(corpus, row_format, tokenizer, skip_misfits=True)
    assert (packer.num_misfits, packer.documents.tolist()) == (1, [0, 2])


def test_when_no_document_fits_there_is_nothing_to_skip_to(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, "interleaved", [[PICTURE, 10]], tokenizer)
    with pytest.raises(DataError, match="take 11 tokens; a sequence has 8"):
        Packer(corpus, RowFormat(sequence_length=8, num_latents=7), tokenizer, skip_misfits=True)


def test_a_corpus_without_documents_is_refused(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, "text", [[10]], tokenizer)
    with pytest.raises(DataError, match="has no documents"):
        Packer(corpus, RowFormat(sequence_length=8, num_latents=2), tokenizer, True, np.zeros(0, dtype=np.int64))


@given(
    gaps=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=40),
    tail=st.integers(0, 30),
    length=st.integers(9, 40),
)
def test_cuts_fall_between_blocks_and_rows_are_as_long_as_they_may(
    gaps: list[tuple[int, int]], tail: int, length: int
) -> None:
    starts, stops, at = [], [], 0
    for gap, size in gaps:
        starts.append(at + gap)
        stops.append(at + gap + size)
        at += gap + size
    total = at + tail + 1
    first, last = cut_rows(total, np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64), length)
    assert (first[0], last[-1]) == (0, total)
    assert first[1:].tolist() == last[:-1].tolist()
    inside = {place for start, stop in zip(starts, stops, strict=True) for place in range(start + 1, stop)}
    assert inside.isdisjoint(first.tolist())
    for start, stop in zip(first.tolist(), last.tolist(), strict=True):
        assert 0 < stop - start <= length
        assert stop == total or set(range(stop + 1, start + length + 1)) <= inside


def test_a_block_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="the block at 3 has 12 tokens, a row 10"):
        cut_rows(100, np.array([3]), np.array([15]), 10)
