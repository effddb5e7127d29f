"""Best-fit rows hold whole documents; one longer than a row is cut between pictures, and no target is lost."""

from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.hashing import shuffled
from megatron_kosmos.data.loading.packed_rows import Packer
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.packing.made_corpora import PAD, PICTURE, Parts, folder_in_memory, make_corpus, stream_of

MODES: tuple[Packing, ...] = ("best_fit", "best_fit_decreasing")
parts = st.lists(st.one_of(st.integers(7, 399), st.just(PICTURE)), max_size=30)


@settings(max_examples=150)
@given(
    documents=st.lists(parts, min_size=1, max_size=12),
    num_latents=st.integers(1, 5),
    extra_length=st.integers(0, 25),
    mode=st.sampled_from([(kind, packing) for kind in get_args(SourceKind) for packing in MODES]),
    seed=st.integers(0, 1000),
)
def test_rows_hold_whole_documents(
    tokenizer: KosmosTokenizer,
    documents: list[Parts],
    num_latents: int,
    extra_length: int,
    mode: tuple[SourceKind, Packing],
    seed: int,
) -> None:
    kind, packing = mode
    if kind == "text":
        documents = [[part for part in document if isinstance(part, int)] for document in documents]
    most = max(document.count(PICTURE) for document in documents)
    length = max(2 + most * (num_latents + 2), 3) + extra_length
    order = shuffled(len(documents), seed)
    with folder_in_memory() as folder:
        corpus = make_corpus(Path(folder), kind, documents, tokenizer)
        packer = Packer(corpus, RowFormat(sequence_length=length, num_latents=num_latents), tokenizer, False)
        plan = packer.plan(order, packing, lambda rows: shuffled(rows, 1))
        rows = [packer.row(plan, number) for number in range(plan.num_rows)]

    expected = {number: stream_of([document], num_latents) for number, document in enumerate(documents)}
    cut = {number for number, tokens in expected.items() if len(tokens) > length}
    assert plan.count_cut_documents() == len(cut)
    assert plan.num_tokens == sum(map(len, expected.values()))
    # Rows say which piece of which document they hold; the pieces make up the documents.
    pieces: dict[int, dict[int, list[int]]] = defaultdict(dict)
    assert plan.offsets is not None
    for number, row in enumerate(rows):
        stored = row.document_ids >= 0
        assert not np.any(np.diff(stored.astype(int)) > 0)
        assert np.all(row.input_ids[~stored] == PAD)
        first = np.flatnonzero(plan.piece_starts == plan.row_starts[number])[0]
        columns = np.flatnonzero(np.diff(row.document_ids[stored], prepend=-1))
        for place, start in enumerate(columns):
            document, offset = int(plan.documents[first + place]), int(plan.offsets[first + place])
            content = row.input_ids[row.document_ids == place].tolist()
            pieces[document][offset] = content
            tokens = expected[document][offset : offset + len(content) + 1]
            assert content == [number for number, _, _ in tokens[: len(content)]]
            # The label of a piece's last token is the document's next one where that is a target.
            labels = row.labels[start : start + len(tokens) - 1]
            counts = row.loss_mask[start : start + len(labels)]
            assert counts.tolist() == [is_text for _, is_text, _ in tokens[1:]]
            assert labels[counts].tolist() == [token for token, is_text, _ in tokens[1:] if is_text]
    for number, tokens in expected.items():
        found = pieces[number]
        assert [token for offset in sorted(found) for token in found[offset]] == [token for token, _, _ in tokens]
        assert len(found) == 1 or number in cut
        for offset in found:  # no piece begins within a picture
            assert offset == 0 or tokens[offset][1] or tokens[offset][0] in (4,) or tokens[offset - 1][0] == 5
    assert sorted(image for row in rows for image in row.images) == list(
        range(len(corpus.images.positions) if corpus.images else 0)
    )
    for row in rows:
        assert [column - 1 for column in row.image_columns] == np.flatnonzero(row.input_ids == 4).tolist()
        assert all(row.input_ids[column + num_latents] == 5 for column in row.image_columns)
    assert sum(int(row.loss_mask.sum()) for row in rows) == sum(t for s in expected.values() for _, t, _ in s)
