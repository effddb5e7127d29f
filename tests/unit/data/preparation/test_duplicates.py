"""Duplicates go as a naive program in memory would drop them, over the boundaries of parts and shards."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import Manifest
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.duplicates import first_occurrences
from megatron_kosmos.data.preparation.encoding import EncodedImage, document_digest
from megatron_kosmos.data.preparation.preprocess import Preparation, merge, prepare, prepare_shard
from megatron_kosmos.data.preparation.tables import DOCUMENT, IMAGE, Tables
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.preparation.part_inputs import PART_BYTES, files_in, make_inputs

Stored = tuple[tuple[int, ...], tuple[bytes, ...]]
"""A document's tokens and its pictures."""


def stored_at(prefix: Path) -> list[Stored]:
    reader, documents = IndexedReader(prefix), []
    store = ImageStore(prefix) if prefix.with_name(f"{prefix.name}.images.idx").exists() else None
    for number in range(len(reader)):
        images = range(0) if store is None else range(*map(int, store.first_images[number : number + 2]))
        tokens = tuple(reader[number].tolist())
        if store is not None:
            assert [tokens[position] for position in store.positions[images.start : images.stop]] == [4] * len(images)
        documents.append((tokens, tuple(store.read(image) for image in images) if store is not None else ()))
    return documents


def without_duplicates(documents: list[Stored], filters: Filters) -> tuple[list[Stored], dict[str, int]]:
    """Return what is left of `documents`, and counts, one document at a time."""
    seen_documents, seen_images = set[Stored](), set[bytes]()
    left, counts = list[Stored](), dict.fromkeys(("duplicate_document", "duplicate_image", "no_images_left"), 0)
    for document in documents:
        if filters.drop_duplicate_documents and document in seen_documents:
            counts["duplicate_document"] += 1
            continue
        seen_documents.add(document)
        tokens, images = list[int](), list[bytes]()
        pictures = iter(document[1])
        is_cut = False
        for token in document[0]:
            if token == 4:
                picture = next(pictures)
                is_cut = filters.drop_duplicate_images and picture in seen_images
                seen_images.add(picture)
                counts["duplicate_image"] += is_cut
                if not is_cut:
                    images.append(picture)
            if not (is_cut and token in (4, 5)):
                tokens.append(token)
        if document[1] and not images:
            counts["no_images_left"] += 1
        else:
            left.append((tuple(tokens), tuple(images)))
    return left, counts


def counted(manifest: Manifest, before: Manifest) -> dict[str, int]:
    """Return how many documents and pictures were dropped as duplicates, or for want of pictures."""
    no_images_left = manifest.filtered.get("no_images_left", 0) - before.filtered.get("no_images_left", 0)
    return {
        "duplicate_document": manifest.filtered.get("duplicate_document", 0),
        "duplicate_image": manifest.dropped_images.get("duplicate_image", 0),
        "no_images_left": no_images_left,
    }


CASES = [
    ("text", Filters(drop_duplicate_documents=True)),
    *(
        (kind, Filters(drop_duplicate_documents=documents, drop_duplicate_images=images))
        for kind in ("caption", "interleaved")
        for documents, images in ((True, False), (False, True), (True, True))
    ),
]


@pytest.mark.parametrize("kind, filters", CASES)
def test_duplicates_go_wherever_they_are(
    memory_path: Path, tokenizer_folder: Path, picture: Callable[..., bytes], kind: SourceKind, filters: Filters
) -> None:
    inputs = make_inputs(memory_path / "in", kind, picture)

    def preparation(name: str, **settings: Any) -> Preparation:
        chosen = {"part_bytes": PART_BYTES[kind], "max_shard_bytes": 10_000, **settings}
        return Preparation(kind, inputs, memory_path / name / "corpus", tokenizer_folder, **chosen)

    everything = preparation("everything")
    before = prepare(everything)
    wanted = preparation("unique", filters=filters)
    manifest = prepare(wanted)
    left, counts = without_duplicates(stored_at(everything.output), filters)
    assert stored_at(wanted.output) == left
    assert counted(manifest, before) == counts
    assert (counts["duplicate_document"] > 0) == filters.drop_duplicate_documents
    assert (counts["duplicate_image"] > 0) == filters.drop_duplicate_images
    assert manifest.documents == len(left)
    assert manifest.tokens == sum(len(tokens) for tokens, _ in left)
    assert manifest.images == sum(len(pictures) for _, pictures in left)
    assert manifest.max_images_per_document == max(len(pictures) for _, pictures in left)

    sharded = preparation("sharded", filters=filters, part_bytes=1 << 20)
    prepare_shard(sharded, 0, 1)
    assert merge(sharded.output).documents == manifest.documents
    assert stored_at(sharded.output) == left
    again = preparation("again", filters=filters)
    for shard in range(3):
        prepare_shard(again, shard, 3)
    merge(again.output)
    assert files_in(again.output.parent) == files_in(wanted.output.parent)


@given(st.lists(st.tuples(st.tuples(st.integers(0, 200), st.integers(0, 2)), st.booleans()), max_size=300))
@settings(max_examples=50)
def test_first_occurrences(rows: list[tuple[tuple[int, int], bool]]) -> None:
    hashes = np.array([hash_words for hash_words, _ in rows], dtype=np.uint64).reshape(-1, 2)
    among = np.array([admitted for _, admitted in rows], dtype=np.bool_)
    seen = set[tuple[int, int]]()
    expected = []
    for hash_words, admitted in rows:
        expected.append(admitted and hash_words not in seen)
        if admitted:
            seen.add(hash_words)
    assert first_occurrences(hashes, among).tolist() == expected


def test_memory_of_finding_duplicates() -> None:
    """The hashes themselves take 16 of the 22 bytes that docs/data.md promises for each."""
    num_rows = 200_000
    words = np.random.default_rng(0).integers(0, 1 << 63, (num_rows, 2), dtype=np.uint64)
    tracemalloc.start()
    first_occurrences(words, np.ones(num_rows, dtype=np.bool_))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 16 + peak / num_rows < 22


@st.composite
def cut_documents(draw: st.DrawFn) -> list[tuple[bool, list[bool | None]]]:
    """Documents that stay or go, of words (None) and pictures that stay or go."""
    document = st.tuples(st.booleans(), st.lists(st.sampled_from([None, True, False]), max_size=6))
    return draw(st.lists(document, min_size=1, max_size=8))


@given(cut_documents())
@settings(max_examples=100)
def test_tables_after_a_cut(documents: list[tuple[bool, list[bool | None]]]) -> None:
    """Rows and tokens are those of the documents written without what goes."""

    def write(keep_all: bool) -> tuple[Tables, list[int]]:
        rows, pictures, tokens = list[tuple[Any, ...]](), list[tuple[Any, ...]](), list[int]()
        for stays, parts in documents:
            if not (stays or keep_all):
                continue
            document = [1]
            number_before = len(pictures)
            for part in parts:
                if part is None:
                    document.append(9)
                elif part or keep_all:
                    pictures.append((0, 1, 0, len(document), (0, 0)))
                    document += [4, 5]
            document.append(2)
            rows.append((len(document), len(pictures) - number_before, (0, 0)))
            tokens += document
        return Tables(np.array(rows, DOCUMENT), np.array(pictures, IMAGE)), tokens

    (before, all_tokens), (after, left) = write(True), write(False)
    keep_documents = np.array([stays for stays, _ in documents])
    keep_images = np.array(
        [bool(part) and stays for stays, parts in documents for part in parts if part is not None], dtype=np.bool_
    )
    cut = before.only(keep_documents, keep_images)
    assert cut.documents.tobytes() == after.documents.tobytes()
    assert cut.images.tobytes() == after.images.tobytes()
    assert np.array(all_tokens)[before.tokens_of_only(keep_documents, keep_images)].tolist() == left


def test_what_makes_documents_equal(tokenizer: KosmosTokenizer) -> None:
    def digest(text: str, *pictures: bytes) -> bytes:
        tokens = np.array([1, *[4, 5] * len(pictures), *tokenizer.encode(text), 2], dtype="<u2")
        return document_digest(tokens, [EncodedImage(data, "png", 1) for data in pictures])

    assert digest("a", b"x", b"y") == digest("a", b"x", b"y")
    others = [
        digest("b", b"x", b"y"),
        digest("a", b"y", b"x"),
        digest("a", b"xy"),
        digest("a", b"x", b"x"),
        digest("a"),
    ]
    assert len({digest("a", b"x", b"y"), *others}) == 6
