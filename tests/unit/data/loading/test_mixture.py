"""The order of training is exact in its shares and a pure function of the seed and the index."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.hashing import shuffled
from megatron_kosmos.data.loading.blend import Blend, EndingBlend, Share
from megatron_kosmos.data.loading.mixture import Epochs, Mixture
from megatron_kosmos.data.loading.packed_rows import Packer
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SOURCE_KINDS, SourceKind

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
def packers(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer: KosmosTokenizer) -> list[Packer]:
    texts = [{"text": f"{number} bottles of beer on the wall" * (number % 5 + 1)} for number in range(30)]
    captions = [{"image": "0.png", "caption": f"picture {number}"} for number in range(40)]
    configs = prepare_blend({"text": texts, "caption": captions}, num_pictures=1)
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


@given(
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=6),
    limits=st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=6, max_size=6),
    kinds=st.lists(st.sampled_from(SOURCE_KINDS), min_size=6, max_size=6),
)
def test_a_corpus_ends_after_its_rows_and_its_weight_goes_to_its_kind(
    weights: list[float], limits: list[int | None], kinds: list[SourceKind]
) -> None:
    shares = [Share(kind, weight, limit) for kind, weight, limit in zip(kinds, weights, limits, strict=False)]
    blend = EndingBlend(shares)
    assert (blend.num_samples is None) == any(share.num_rows is None for share in shares)
    stop = 150 if blend.num_samples is None else blend.num_samples
    drawn = Counter[int]()
    for index in range(stop):
        corpus, number = blend.locate(index)
        assert number == drawn[corpus]  # every row once, in its order
        drawn[corpus] += 1
        assert index < blend.ends.get(corpus, stop)
    for corpus, end in blend.ends.items():
        assert end > stop or drawn[corpus] == shares[corpus].num_rows
    if blend.num_samples is not None:
        with pytest.raises(IndexError):
            blend.locate(stop)
    # As long as a kind has a corpus left, it has its share.
    starts = sorted({0, *(end for end in blend.ends.values() if end < stop)})
    total = sum(weights)
    for first, last in zip(starts, [*starts[1:], stop], strict=True):
        kinds_left = {share.kind for corpus, share in enumerate(shares) if blend.ends.get(corpus, stop + 1) > first}
        if kinds_left != {share.kind for share in shares}:
            break
        counts = Counter(shares[blend.locate(index)[0]].kind for index in range(first, last))
        for kind in kinds_left:
            expected = (last - first) * sum(share.weight for share in shares if share.kind == kind) / total
            assert abs(counts[kind] - expected) < 2 * len(shares)


def test_a_blend_that_was_written_down() -> None:
    """Text b has two rows; then text a has the weight of both. The order may never change under a run that resumes."""
    blend = EndingBlend([Share("text", 1.0), Share("text", 1.0, num_rows=2), Share("caption", 2.0)])
    assert "".join("abc"[blend.locate(index)[0]] for index in range(20)) == "cacbcacbcacacacacaca"
    assert blend.ends == {1: 11}  # its third row would be sample 11
    assert blend.num_samples is None


def test_a_corpus_of_two_epochs(packers: list[Packer]) -> None:
    mixture = Mixture(packers, [1.0, 1.0], 3, num_epochs=[None, 2])
    endless = Mixture(packers, [1.0, 1.0], 3)
    end = mixture.blend.ends[1]
    before = [mixture[index] for index in range(end)]
    assert Counter(image for sample in before for image in sample.row.images) == dict.fromkeys(range(40), 2)
    assert all(sample.row.images == endless[index].row.images for index, sample in enumerate(before))
    assert {mixture[index].corpus for index in range(end, end + 20)} == {0}


@pytest.mark.parametrize("packing", ["best_fit", "best_fit_decreasing"])
def test_rows_of_whole_documents_are_shuffled(packers: list[Packer], packing: Packing) -> None:
    epochs = Epochs(packers[0], seed=1, stream=0, packing=packing)
    fill = [int((epochs.row(number).document_ids >= 0).sum()) for number in range(epochs.count_rows(1))]
    assert fill != sorted(fill)
    assert fill != sorted(fill, reverse=True)
    summary = epochs.summary(0)
    assert (summary.num_rows, summary.num_tokens) == (len(fill), sum(fill))
