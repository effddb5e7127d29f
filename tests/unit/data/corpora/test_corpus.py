"""A prepared corpus opens only whole, with its own tokenizer and as its own kind; its fingerprint is its content's."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.corpora.corpus import Corpus, data_fingerprint
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer


@pytest.fixture
def captions(
    prepare_corpus: Callable[..., CorpusConfig],
    write_lines: Callable[[str, Sequence[str]], Path],
    picture: Callable[..., bytes],
    tmp_path: Path,
) -> CorpusConfig:
    (tmp_path / "a.png").write_bytes(picture())
    return prepare_corpus("caption", write_lines("captions.jsonl", ['{"image": "a.png", "caption": "one"}'] * 2))


def test_opening(captions: CorpusConfig, tokenizer: KosmosTokenizer) -> None:
    corpus = Corpus(captions, tokenizer)
    assert len(corpus) == 2
    assert corpus.tokens(1).tolist() == [1, 4, 5, *tokenizer.encode("one"), 2]
    assert corpus.num_images.tolist() == [1, 1]
    assert corpus.images_of(1) == range(1, 2)
    assert corpus.image_positions(1).tolist() == [1]


def test_another_kind_or_tokenizer_is_refused(captions: CorpusConfig, tokenizer: KosmosTokenizer) -> None:
    with pytest.raises(DataError, match="holds caption documents; the configuration says kind: interleaved"):
        Corpus(captions.model_copy(update={"kind": "interleaved"}), tokenizer)
    other = train_tokenizer(["some other text"] * 3, TrainingSettings(273))
    with pytest.raises(DataError, match=rf"another tokenizer \(fingerprint {tokenizer.fingerprint[:12]}"):
        Corpus(captions, other)


@pytest.mark.parametrize(
    "name",
    ["captions.bin", "captions.idx", "captions.images.idx", "captions-images-00000.tar", "captions.manifest.json"],
)
def test_truncated_and_missing_files(captions: CorpusConfig, tokenizer: KosmosTokenizer, name: str) -> None:
    path = captions.prefix.parent / name
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    size = rf"truncated: {len(data) - 3} bytes, expected {len(data)}"
    with pytest.raises(DataError, match=rf"{name} is {'damaged' if name.endswith('json') else size}"):
        Corpus(captions, tokenizer)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        Corpus(captions, tokenizer)


def test_an_image_index_that_points_at_other_tokens(captions: CorpusConfig, tokenizer: KosmosTokenizer) -> None:
    path = captions.prefix.parent / "captions.images.idx"
    data = np.fromfile(path, dtype="<i4")
    data[-1] = 2
    data.tofile(path)
    with pytest.raises(DataError, match="the <image> tokens of document 1 are not where the image index says"):
        Corpus(captions, tokenizer).tokens(1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"documents": 3}, "says documents: 3, the indexes hold 2"),
        ({"tokens": 2**63}, "says tokens: 9223372036854775808, the indexes hold "),
        ({"images": 0}, "says images: 0, the indexes hold 2"),
        ({"max_images_per_document": 9}, "says max_images_per_document: 9, the indexes hold 1"),
        ({"files": {}}, "does not name captions.bin"),
        ({"files": {"../victim": {"bytes": 6, "sha256": ""}}}, "names '../victim', which is no file of this corpus"),
        (
            {"files": {"/etc/passwd": {"bytes": 6, "sha256": ""}}},
            "names '/etc/passwd', which is no file of this corpus",
        ),
    ],
)
def test_a_manifest_that_lies(
    captions: CorpusConfig, tokenizer: KosmosTokenizer, tokenizer_folder: Path, changes: dict[str, Any], message: str
) -> None:
    """Nor are the files that it names deleted with the corpus."""
    victim = captions.prefix.parent.parent / "victim"
    victim.write_text("victim")
    path = captions.prefix.with_name("captions.manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=rf"captions\.manifest\.json {re.escape(message)}"):
        Corpus(captions, tokenizer)
    text = captions.prefix.parent / "a.txt"
    text.write_text("x")
    prepare(Preparation("text", (text,), captions.prefix, tokenizer_folder, overwrite=True))
    assert victim.read_text() == "victim"


@pytest.mark.parametrize("positions", [(0, 1), (1, 9), (-1, 1), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_positions_outside_of_the_document(
    captions: CorpusConfig, tokenizer: KosmosTokenizer, positions: tuple[int, int]
) -> None:
    """They would be planned with before the tokens are read."""
    path = captions.prefix.with_name("captions.images.idx")
    data = np.fromfile(path, dtype="<i4")
    data[-2:] = positions
    data.tofile(path)
    with pytest.raises(DataError, match=r"captions\.images\.idx contradicts itself: pictures lie outside of their doc"):
        Corpus(captions, tokenizer)


def test_ids_outside_of_the_vocabulary(captions: CorpusConfig, tokenizer: KosmosTokenizer) -> None:
    path = captions.prefix.with_name("captions.bin")
    data = np.fromfile(path, dtype="<u2")
    data[-2] = tokenizer.vocab_size
    data.tofile(path)
    corpus = Corpus(captions, tokenizer)
    assert len(corpus.tokens(0)) == corpus.lengths[0]
    with pytest.raises(
        DataError, match=r"captions\.bin is damaged: document 1 has ids outside of the vocabulary of 400"
    ):
        corpus.tokens(1)


@pytest.mark.parametrize("name", ["captions.idx", "captions.manifest.json", "captions-images-00000.tar"])
@pytest.mark.parametrize("what", ["folder", "pipe", "device"])
def test_what_is_no_file(captions: CorpusConfig, tokenizer: KosmosTokenizer, name: str, what: str) -> None:
    path = captions.prefix.with_name(name)
    path.unlink()
    if what == "device":
        path.symlink_to("/dev/zero")
    else:
        (os.mkfifo if what == "pipe" else os.mkdir)(path)
    with pytest.raises(DataError, match=rf"{name} is no file, but a folder, device or pipe"):
        Corpus(captions, tokenizer)


def test_a_corpus_that_is_replaced_while_it_is_read(
    captions: CorpusConfig, tokenizer: KosmosTokenizer, tokenizer_folder: Path
) -> None:
    """The reader keeps what it has opened."""
    corpus = Corpus(captions, tokenizer)
    before, images = corpus.tokens(1).tolist(), corpus.images
    assert images is not None
    picture = images.read(1)
    text = captions.prefix.parent / "a.txt"
    text.write_text("x")
    prepare(Preparation("text", (text,), captions.prefix, tokenizer_folder, overwrite=True))
    assert (corpus.tokens(1).tolist(), images.read(1)) == (before, picture)


def test_the_fingerprint_changes_with_what_batches_depend_on(
    captions: CorpusConfig,
    tokenizer_folder: Path,
    prepare_corpus: Callable[..., CorpusConfig],
    write_lines: Callable[[str, Sequence[str]], Path],
    tmp_path: Path,
) -> None:
    text = prepare_corpus("text", write_lines("text.jsonl", ['{"text": "a text"}']))

    def fingerprint(*train: CorpusConfig, **changes: Any) -> str:
        values: dict[str, Any] = {"tokenizer": tokenizer_folder, "sequence_length": 64, "train": train, **changes}
        return data_fingerprint(DataConfig(**values))

    base = fingerprint(captions, text)
    shutil.copytree(captions.prefix.parent, tmp_path / "elsewhere")
    moved = captions.model_copy(update={"prefix": tmp_path / "elsewhere" / "captions"})
    assert fingerprint(moved, text, num_workers=7, heldout=(text,)) == base
    heavier = text.model_copy(update={"weight": 2.0})
    others = [
        fingerprint(text, captions),
        fingerprint(captions),
        fingerprint(captions, heavier),
        fingerprint(captions, text, sequence_length=65),
        fingerprint(captions, text, packing="best_fit"),
        fingerprint(captions, text, packing="best_fit_decreasing"),
        fingerprint(captions, text.model_copy(update={"epochs": 2})),
        fingerprint(captions, text.model_copy(update={"heldout_fraction": 0.5})),
    ]
    others.append(fingerprint(captions, prepare_corpus("text", write_lines("other.jsonl", ['{"text": "another"}']))))
    assert len({base, *others}) == 10
