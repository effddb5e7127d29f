"""The order of samples is exact: stopped anywhere and resumed with other ranks and workers, under every packing."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.corpora.corpus import data_fingerprint
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, RankPart, StepLoader
from megatron_kosmos.prompt import SourceKind

PACKINGS = get_args(Packing)
NUM_STEPS = 7
SIZE = 8


@pytest.fixture
def data(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path) -> DataConfig:
    """A blend of the three kinds: several epochs of captions in the steps of a test, texts longer than a row."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "text": [{"text": f"{number} bottles of beer on the wall " * (number % 7 + 1)} for number in range(40)],
        "caption": [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(9)],
        "interleaved": [
            {"parts": [{"text": f"see {number}"}, {"image": f"{number % 9}.png"}, {"text": "and so on " * number}]}
            for number in range(12)
        ],
    }
    return DataConfig(tokenizer=tokenizer_folder, sequence_length=64, train=prepare_blend(lines, 9), num_workers=0)


def rows_of(batch: MultimodalBatch) -> list[str]:
    """Return a hash of each row: its tokens, targets, documents and pictures."""
    hashes = []
    length = batch.input_ids.shape[1]
    for number in range(len(batch.input_ids)):
        digest = hashlib.sha256()
        for field in ("input_ids", "labels", "loss_mask", "position_ids", "sources"):
            digest.update(getattr(batch, field)[number].numpy().tobytes())
        mine = batch.image_positions[:, 0] == number
        digest.update(batch.image_positions[mine, 1].numpy().tobytes() + batch.images[mine].numpy().tobytes())
        starts = batch.document_starts - number * length
        digest.update(starts[(starts >= 0) & (starts < length)].numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def read(data: DataConfig, start: int, stop: int, dp_size: int = 1, plans: Path | None = None) -> list[list[str]]:
    """Return the rows of each step in the order of samples, as `dp_size` ranks read them."""
    micro = 2 if dp_size < 4 else 1
    ranks = []
    for rank in range(dp_size):
        geometry = BatchGeometry(micro, SIZE, dp_rank=rank, dp_size=dp_size)
        ranks.append(list(StepLoader(data, ImageFormat(4, 8), geometry, 5, plan_folder=plans).steps(start, stop)))
    per_step = SIZE // dp_size // micro
    return [
        [row for number in range(per_step) for rank in ranks for row in rows_of(rank[step][number])]
        for step in range(stop - start)
    ]


def read_in_parts(data: DataConfig, start: int, stop: int, dp_size: int) -> list[list[str]]:
    """Return the same, put together from what two tensor ranks of stage 0 and a middle stage of each data rank read."""
    micro, part = 1, RankPart(tp_size=2)
    parts = [part, replace(part, tokens=False, tp_rank=1), RankPart(tokens=False, images=False)]
    ranks = []
    for rank in range(dp_size):
        geometries = [BatchGeometry(micro, SIZE, dp_rank=rank, dp_size=dp_size, part=one) for one in parts]
        loaders = [StepLoader(data, ImageFormat(4, 8), geometry, 5) for geometry in geometries]
        steps = zip(*(loader.steps(start, stop) for loader in loaders), strict=True)
        ranks.append([[join(*batches) for batches in zip(*step, strict=True)] for step in steps])
    return [
        [row for number in range(SIZE // dp_size) for rank in ranks for row in rows_of(rank[step][number])]
        for step in range(stop - start)
    ]


def join(first: MultimodalBatch, second: MultimodalBatch, middle: MultimodalBatch) -> MultimodalBatch:
    """Return the batch whose metadata the middle stage has and whose images two tensor ranks have decoded."""
    images = torch.cat((first.images, second.images))
    return replace(middle, input_ids=first.input_ids, labels=first.labels, images=images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_goes_on_where_it_stopped(data: DataConfig, packing: Packing, tmp_path: Path) -> None:
    data = data.model_copy(update={"packing": packing, "document_mask": packing != "concatenate"})
    whole = read(data, 0, NUM_STEPS)
    assert len({row for step in whole for row in step}) > 0.6 * SIZE * NUM_STEPS
    # A Latin square: three layouts for each packing, so that every two choices of ranks, workers and packing meet.
    row = PACKINGS.index(packing)
    for number, dp_size in enumerate((1, 2, 4)):
        stopped = (1 + 3 * row + number) % NUM_STEPS
        resumed = data.model_copy(update={"num_workers": (0, 1, 3)[(number + row) % 3]})
        plans = tmp_path / "plans" if (number + row) % 2 else None
        assert read(resumed, stopped, NUM_STEPS, dp_size, plans) == whole[stopped:]
    assert read_in_parts(data, 3, NUM_STEPS, dp_size=2) == whole[3:]


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_goes_on_from_any_step_with_any_ranks_and_workers(data: DataConfig, packing: Packing) -> None:
    data = data.model_copy(update={"packing": packing, "document_mask": packing != "concatenate"})
    whole = read(data, 0, NUM_STEPS)
    for stopped, dp_size, num_workers in product(range(NUM_STEPS), (1, 2, 4), (0, 1, 3)):
        resumed = data.model_copy(update={"num_workers": num_workers})
        assert read(resumed, stopped, NUM_STEPS, dp_size) == whole[stopped:]
        assert read_in_parts(resumed, stopped, NUM_STEPS, dp_size) == whole[stopped:]


def test_packings_give_other_batches(data: DataConfig) -> None:
    configs = [data.model_copy(update={"packing": packing}) for packing in PACKINGS]
    assert len({str(read(config, 0, 2)) for config in configs}) == 3
    assert len({data_fingerprint(config) for config in configs}) == 3


@pytest.mark.parametrize("packing", ["best_fit", "best_fit_decreasing"])
def test_rows_of_whole_documents_begin_with_one(data: DataConfig, packing: Packing) -> None:
    captions = data.model_copy(update={"packing": packing, "train": data.train[1:2], "document_mask": True})
    for step in StepLoader(captions, ImageFormat(4, 8), BatchGeometry(2, SIZE), 5).steps(0, 3):
        for batch in step:
            flat = batch.input_ids.flatten()
            starts = batch.document_starts[:-1].long()
            assert set(flat[starts].tolist()) <= {0, 1}  # padding or <s>
            assert int((flat[starts] == 1).sum()) == int((flat == 1).sum())


def test_skipped_steps_are_passed_over(data: DataConfig) -> None:
    whole = read(data, 0, 9)
    skipping = data.model_copy(update={"skip_steps": ((2, 3), (6, 6))})
    expected = [whole[0], whole[3], whole[4], whole[6], whole[7], whole[8]]
    assert read(skipping, 0, 6) == expected
    assert read(skipping, 3, 6, dp_size=2) == expected[3:]
    assert data_fingerprint(skipping) == data_fingerprint(data)


def test_a_corpus_that_ends_is_told_and_data_that_do_not_last_are_refused(data: DataConfig) -> None:
    captions = data.train[1].model_copy(update={"epochs": 2})
    some = data.model_copy(update={"train": (data.train[0], captions, data.train[2])})
    assert data_fingerprint(some) != data_fingerprint(data)
    loader = StepLoader(some, ImageFormat(4, 8), BatchGeometry(2, SIZE), 5)
    report = loader.packing_report()
    assert [corpus.last_step is None for corpus in report.corpora] == [True, False, True]
    assert f"ends at step {report.corpora[1].last_step}, its weight goes to" in str(report)
    assert len(read(some, 0, 5)) == 5
    ending = data.model_copy(update={"train": (captions,), "skip_steps": ((1, 1),)})
    loader = StepLoader(ending, ImageFormat(4, 8), BatchGeometry(1, 1), 5)
    last = loader.packing_report().corpora[0].last_step
    assert last is not None
    assert len(list(loader.steps(0, last))) == last
    with pytest.raises(DataError, match=f"together they last for {last} steps, not {last + 1}; give one of them more"):
        next(loader.steps(0, last + 1))


def test_the_report_counts_what_the_rows_hold(data: DataConfig) -> None:
    config = data.model_copy(update={"packing": "best_fit", "train": data.train[:1], "document_mask": True})
    loader = StepLoader(config, ImageFormat(4, 8), BatchGeometry(1, 1), 5)
    report = loader.packing_report()
    (corpus,) = report.corpora
    filled = sum(int((batch.input_ids != 0).sum()) for (batch,) in loader.steps(0, corpus.summary.num_rows))
    assert report.efficiency == pytest.approx(filled / (corpus.summary.num_rows * 64))
    assert 0 < report.documents_cut < 40
    assert f"packing best_fit: {report.efficiency:.2%} of 64 positions filled" in str(report)
