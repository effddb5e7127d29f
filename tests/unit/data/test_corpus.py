"""A prepared corpus opens only whole, with its own tokenizer and as its own kind; its fingerprint is its content's."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.corpus import Corpus, data_fingerprint
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenizer import KosmosTokenizer
from megatron_kosmos.data.tokenizer_making import TrainingSettings, train_tokenizer


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
        Corpus(captions, tokenizer).image_positions(1)


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
