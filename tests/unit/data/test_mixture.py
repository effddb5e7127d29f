"""The order of training is exact in its shares and a pure function of the seed and the index."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.data.corpus import Corpus
from megatron_kosmos.data.mixture import Blend, Epochs, Mixture, shuffled
from megatron_kosmos.data.packing import Packer
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.tokenizer import KosmosTokenizer

weights = st.lists(st.floats(0.001, 1000).map(lambda x: round(x, 3)), min_size=1, max_size=20)
THE_PAPERS_TEXT = (21.8, 17.7, 16.2, 14.7, 10.6, 10.2, 5.4, 1.1, 1.0, 1.0, 0.2)


@given(weights=weights, start=st.integers(0, 10**12))
def test_each_corpus_is_numbered_without_gaps(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    expected: dict[int, int] = {}
    for index in range(start, start + 50):
        corpus, number = blend.locate(index)
        assert number == expected.get(corpus, number)
        expected[corpus] = number + 1


@given(weights=weights)
def test_shares_are_right_after_any_number_of_samples(weights: list[float]) -> None:
    blend, counts = Blend(weights), Counter[int]()
    for index in range(200):
        corpus, number = blend.locate(index)
        assert number == counts[corpus]
        counts[corpus] += 1
        assert all(abs(counts[i] - (index + 1) * w / sum(weights)) < 2 for i, w in enumerate(weights))


def test_whole_shares_come_out_even() -> None:
    """6 : 7 : 3, in each step of 16: what the quickstart asks for."""
    blend = Blend([6, 7, 3])
    for step in range(10):
        assert Counter(blend.locate(16 * step + sample)[0] for sample in range(16)) == {0: 6, 1: 7, 2: 3}
    far = 10**15 * 16
    assert Counter(blend.locate(far + sample)[0] for sample in range(16)) == {0: 6, 1: 7, 2: 3}
    paper = Blend(THE_PAPERS_TEXT)
    counts = Counter(paper.locate(index)[0] for index in range(999))
    assert [counts[corpus] for corpus in range(11)] == [int(10 * weight) for weight in THE_PAPERS_TEXT]


def test_shuffles_are_permutations_of_their_own() -> None:
    base = shuffled(1000, 1, 2, 3)
    assert sorted(base.tolist()) == list(range(1000))
    assert base.tolist() == shuffled(1000, 1, 2, 3).tolist()
    others = [shuffled(1000, 2, 2, 3), shuffled(1000, 1, 3, 2), shuffled(1000, 1, 2, 4), np.arange(1000)]
    assert all(np.mean(base == other) < 0.02 for other in others)
    # A value that was written down: the order may never change under a run that resumes.
    assert shuffled(8, 1, 0, 0).tolist() == [4, 2, 6, 5, 3, 1, 7, 0]


def test_shuffles_are_uniform() -> None:
    """Each of 6 orders of 3 items comes up about as often: chi squared below its 99.9% point for 5 degrees."""
    counts = Counter(tuple(shuffled(3, seed).tolist()) for seed in range(6000))
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5
    assert len(counts) == 6


@pytest.fixture
def packers(
    prepare_corpus: Callable[..., CorpusConfig],
    write_lines: Callable[[str, Sequence[str]], Path],
    picture: Callable[..., bytes],
    tokenizer: KosmosTokenizer,
    tmp_path: Path,
) -> list[Packer]:
    (tmp_path / "a.png").write_bytes(picture())
    texts = [json.dumps({"text": f"{number} bottles of beer on the wall" * (number % 5 + 1)}) for number in range(30)]
    captions = [json.dumps({"image": "a.png", "caption": f"picture {number}"}) for number in range(40)]
    configs = [
        prepare_corpus("text", write_lines("text.jsonl", texts)),
        prepare_corpus("caption", write_lines("captions.jsonl", captions)),
    ]
    row_format = RowFormat(sequence_length=64, num_latents=4)
    return [Packer(Corpus(config, tokenizer), row_format, tokenizer, skip_misfits=False) for config in configs]


def test_each_epoch_has_every_document_in_another_order(packers: list[Packer]) -> None:
    epochs = Epochs(packers[1], seed=1, stream=0)
    by_epoch: dict[int, list[int]] = {}
    for number in range(60):
        epoch, _ = epochs.locate(number)
        by_epoch.setdefault(epoch, []).extend(epochs.row(number).images)
    whole = [by_epoch[epoch] for epoch in sorted(by_epoch)[:-1]]
    assert len(whole) >= 3
    assert all(sorted(images) == list(range(40)) for images in whole)
    assert len({tuple(images) for images in whole}) == len(whole)


def test_any_index_can_be_read_first(packers: list[Packer]) -> None:
    """Reading from the middle, backwards, or in a fresh object gives the samples of reading from the start."""
    mixture = Mixture(packers, [1.0, 2.0], seed=3)
    in_order = [mixture[index] for index in range(60)]
    assert Counter(sample.corpus for sample in in_order) == {0: 20, 1: 40}
    for index in (59, 3, 31, 30, 0):
        fresh = Mixture(packers, [1.0, 2.0], seed=3)[index]
        assert fresh.corpus == in_order[index].corpus
        assert fresh.row.images == in_order[index].row.images
        assert np.array_equal(fresh.row.input_ids, in_order[index].row.input_ids)
    other_seed = Mixture(packers, [1.0, 2.0], seed=4)
    assert any(not np.array_equal(other_seed[i].row.input_ids, in_order[i].row.input_ids) for i in range(5))
