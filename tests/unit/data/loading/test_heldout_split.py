"""No document is trained on and held out: the sides of a corpus are disjoint, and what would overlap is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pytest

from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.loading.heldout_split import Side, documents_of, refuse_overlap
from megatron_kosmos.data.loading.loader import (
    BatchGeometry,
    ImageFormat,
    StepLoader,
    heldout_batches,
    heldout_captions,
)
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

PrepareLines = Callable[[str, Sequence[str]], CorpusConfig]


@pytest.fixture
def prepare_texts(
    prepare_corpus: Callable[..., CorpusConfig], write_lines: Callable[[str, Sequence[str]], Path]
) -> PrepareLines:
    return lambda name, texts: prepare_corpus("text", write_lines(name, [json.dumps({"text": text}) for text in texts]))


def share(config: CorpusConfig, fraction: float | None) -> CorpusConfig:
    return config.model_copy(update={"heldout_fraction": fraction})


def texts_of(config: CorpusConfig, tokenizer: KosmosTokenizer) -> dict[str, set[str]]:
    corpus = Corpus(config, tokenizer)
    sides: dict[str, set[str]] = {}
    for side in get_args(Side):
        documents = documents_of(corpus, config, side)
        assert documents is not None
        sides[side] = {tokenizer.decode(corpus.tokens(number)) for number in documents.tolist()}
    return sides


def test_every_text_is_on_one_side_wherever_it_comes(prepare_texts: PrepareLines, tokenizer: KosmosTokenizer) -> None:
    texts = [f"text number {number}" + " and so on" * (number % 40) for number in range(600)]
    config = share(prepare_texts("one.jsonl", [*texts, *texts[:100]]), 0.1)  # some come twice
    sides = texts_of(config, tokenizer)
    assert sides["train"].isdisjoint(sides["heldout"])
    assert sides["train"] | sides["heldout"] == set(texts)
    assert 30 < len(sides["heldout"]) < 90
    other = texts_of(share(prepare_texts("other.jsonl", ["new " * 90, *texts[::-3]]), 0.1), tokenizer)
    assert other["heldout"] - {"new " * 90} == sides["heldout"] & set(texts[::-3])
    # A smaller fraction is a part of a larger one.
    assert texts_of(share(config, 0.02), tokenizer)["heldout"] < sides["heldout"]
    corpus = Corpus(config, tokenizer)
    assert documents_of(corpus, share(config, None), "heldout") is None


def test_documents_that_differ_late_are_still_split(prepare_texts: PrepareLines, tokenizer: KosmosTokenizer) -> None:
    """Long documents with one beginning differ in length; those that don't are on the same side."""
    config = share(prepare_texts("long.jsonl", ["the same " * (100 + number) for number in range(200)]), 0.5)
    sides = texts_of(config, tokenizer)
    assert min(len(sides["train"]), len(sides["heldout"])) > 60


def test_training_and_evaluation_see_their_side(
    prepare_texts: PrepareLines, tokenizer: KosmosTokenizer, tokenizer_folder: Path
) -> None:
    config = share(prepare_texts("one.jsonl", [f"text number {number}" for number in range(80)]), 0.25)
    data = DataConfig(tokenizer=tokenizer_folder, sequence_length=64, train=(config,), heldout=(config,), num_workers=0)
    refuse_overlap(data)
    sides = texts_of(config, tokenizer)
    geometry, images = BatchGeometry(1, 1), ImageFormat(4, 8)
    heldout = [batch for step in heldout_batches(data, config, images, geometry, 1000) for batch in step]
    num_targets = sum(batch.num_target_tokens for batch in heldout)
    assert num_targets == sum(len(tokenizer.encode(text)) + 1 for text in sides["heldout"])
    loader = StepLoader(data.model_copy(update={"packing": "best_fit"}), images, geometry, seed=1)
    (corpus,) = loader.packing_report().corpora
    trained = [batch for step in loader.steps(0, corpus.summary.num_rows) for batch in step]
    assert sum(batch.num_target_tokens for batch in trained) == sum(
        len(tokenizer.encode(text)) + 1 for text in sides["train"]
    )


def test_heldout_captions_are_of_their_side(captions: CorpusConfig, tokenizer_folder: Path) -> None:
    config = share(captions, 0.5)
    data = DataConfig(tokenizer=tokenizer_folder, sequence_length=64, train=(config,))
    tokenizer = KosmosTokenizer.load(tokenizer_folder)
    assert {caption for _, caption in heldout_captions(data, config, 100)} == texts_of(config, tokenizer)["heldout"]


@pytest.fixture
def captions(prepare_blend: Callable[..., tuple[CorpusConfig, ...]]) -> CorpusConfig:
    lines = [{"image": "0.png", "caption": f"picture {number}"} for number in range(30)]
    return prepare_blend({"caption": lines}, num_pictures=1)[0]


@pytest.mark.parametrize("train, heldout", [(None, None), (None, 0.1), (0.1, None), (0.1, 0.2)])
def test_overlap_is_refused(
    prepare_texts: PrepareLines, tokenizer_folder: Path, tmp_path: Path, train: float | None, heldout: float | None
) -> None:
    config = prepare_texts("one.jsonl", [f"text number {number}" for number in range(80)])
    shutil.copytree(config.prefix.parent, tmp_path / "elsewhere")
    copy = config.model_copy(update={"prefix": tmp_path / "elsewhere" / "one"})
    data = DataConfig(
        tokenizer=tokenizer_folder, sequence_length=64, train=(share(config, train),), heldout=(share(copy, heldout),)
    )
    with pytest.raises(DataError, match=r"documents of data\.heldout would be trained on: \S*elsewhere/one \(heldout_"):
        refuse_overlap(data)
    refuse_overlap(data.model_copy(update={"train": (share(config, 0.3),), "heldout": (share(copy, 0.3),)}))


def test_a_side_without_documents(prepare_texts: PrepareLines, tokenizer: KosmosTokenizer) -> None:
    config = share(prepare_texts("one.jsonl", ["a", "b"]), 1e-6)
    with pytest.raises(DataError, match=r"heldout_fraction=1e-06 leaves none of its 2 documents for data\.heldout"):
        documents_of(Corpus(config, tokenizer), config, "heldout")


def sides_of(config: CorpusConfig, tokenizer: KosmosTokenizer, folder: Path | None) -> list[list[int]]:
    corpus = Corpus(config, tokenizer)
    sides = [documents_of(corpus, config, side, folder) for side in get_args(Side)]
    return [documents.tolist() for documents in sides if documents is not None]


def test_other_processes_find_the_split(
    prepare_texts: PrepareLines, tokenizer: KosmosTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = share(prepare_texts("one.jsonl", [f"text number {number}" for number in range(80)]), 0.25)
    expected = sides_of(config, tokenizer, None)
    assert sides_of(config, tokenizer, tmp_path / "plans") == expected
    with monkeypatch.context() as patch:
        patch.setattr(IndexedReader, "beginnings", lambda *_: pytest.fail("the tokens are read again"))
        assert sides_of(config, tokenizer, tmp_path / "plans") == expected
        with pytest.raises(pytest.fail.Exception, match="the tokens are read again"):
            sides_of(share(config, 0.5), tokenizer, tmp_path / "plans")
    # Another corpus and another fraction have splits of their own.
    other = share(prepare_texts("two.jsonl", [f"text number {number}" for number in range(1, 81)]), 0.25)
    assert sides_of(other, tokenizer, tmp_path / "plans") == sides_of(other, tokenizer, None) != expected
    half = share(config, 0.5)
    assert sides_of(half, tokenizer, tmp_path / "plans") == sides_of(half, tokenizer, None) != expected
    assert len(list((tmp_path / "plans").glob("*.split"))) == 3


def test_a_damaged_split_is_made_again(prepare_texts: PrepareLines, tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    config = share(prepare_texts("one.jsonl", [f"text number {number}" for number in range(80)]), 0.25)
    expected = sides_of(config, tokenizer, tmp_path / "plans")
    (path,) = (tmp_path / "plans").glob("*.split")
    content = path.read_bytes()
    path.unlink()  # what is open keeps what it had
    path.write_bytes(content[:16] + content[24:] + bytes(8))
    assert sides_of(config, tokenizer, tmp_path / "plans") == expected
    assert path.read_bytes() == content


def test_a_folder_without_room_costs_time_only(
    prepare_texts: PrepareLines, tokenizer: KosmosTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = share(prepare_texts("one.jsonl", [f"text number {number}" for number in range(80)]), 0.25)
    (tmp_path / "plans").write_text("a file")
    assert sides_of(config, tokenizer, tmp_path / "plans") == sides_of(config, tokenizer, None)
    assert "every process hashes the documents of" in caplog.text
