"""Batches are the same for any number of ranks and workers and any place to start; bad pictures are told or counted."""

import hashlib
import multiprocessing
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.loading.loader import (
    BatchGeometry,
    ImageFormat,
    RankPart,
    StepLoader,
    heldout_batches,
    heldout_captions,
)
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SOURCE_KINDS, SourceKind

IMAGES = ImageFormat(num_latents=4, size=8)
ONE_RANK = BatchGeometry(micro_batch_size=2, global_batch_size=8)
NUM_CAPTIONS = 40


@pytest.fixture
def data(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path) -> DataConfig:
    """A blend of the three kinds."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "text": [{"text": f"{number} bottles of beer on the wall " * (number % 5 + 1)} for number in range(30)],
        "caption": [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(NUM_CAPTIONS)],
        "interleaved": [
            {"parts": [{"text": "see"}, {"image": f"{number}.png"}, {"text": "and"}, {"image": f"{number + 1}.png"}]}
            for number in range(20)
        ],
    }
    weights: dict[SourceKind, float] = {"text": 2.0, "caption": 5.0, "interleaved": 1.0}
    corpora = tuple(
        corpus.model_copy(update={"weight": weights[corpus.kind]}) for corpus in prepare_blend(lines, NUM_CAPTIONS)
    )
    return DataConfig(
        tokenizer=tokenizer_folder, sequence_length=64, train=corpora, heldout=corpora[1:2], num_workers=0
    )


def rows_of(batch: MultimodalBatch) -> list[str]:
    """Return a hash of each row with its pictures."""
    rows = []
    for number in range(len(batch.input_ids)):
        digest = hashlib.sha256()
        for field in ("input_ids", "labels", "loss_mask", "position_ids", "sources"):
            digest.update(getattr(batch, field)[number].numpy().tobytes())
        mine = batch.image_positions[:, 0] == number
        digest.update(batch.image_positions[mine, 1].numpy().tobytes() + batch.images[mine].numpy().tobytes())
        rows.append(digest.hexdigest())
    return rows


def read(data: DataConfig, geometry: BatchGeometry, start: int, stop: int) -> list[list[MultimodalBatch]]:
    return list(StepLoader(data, IMAGES, geometry, seed=5).steps(start, stop))


def test_batches_are_as_the_contract_says(data: DataConfig, tokenizer: KosmosTokenizer) -> None:
    steps = read(data, ONE_RANK, 0, 4)
    assert [len(step) for step in steps] == [4] * 4
    for batch in (batch for step in steps for batch in step):
        for field in ("input_ids", "labels", "loss_mask", "position_ids"):
            assert getattr(batch, field).shape == (2, 64)
        types = {field.name: getattr(batch, field.name).dtype for field in fields(batch)}
        assert types.pop("loss_mask") == torch.bool
        assert types.pop("document_starts") == torch.int32
        assert types.pop("images") == torch.float32
        assert set(types.values()) == {torch.int64}
        assert batch.position_ids.tolist() == [list(range(64))] * 2
        assert batch.document_starts.tolist() == [0, 64, 128]
        assert batch.images.shape == (len(batch.image_positions), 3, 8, 8)
        for row, column in batch.image_positions.tolist():
            assert batch.input_ids[row, column - 1] == tokenizer.image_id
            assert batch.input_ids[row, column : column + 4].tolist() == [tokenizer.pad_id] * 4
            assert batch.input_ids[row, column + 4] == tokenizer.end_of_image_id
        assert torch.isin(batch.labels[batch.loss_mask], torch.tensor([0, 1, 4, 5])).sum() == 0
    # 2 : 5 : 1, exactly in each step of 8.
    for step in steps:
        assert torch.cat([batch.sources for batch in step]).bincount().tolist() == [2, 5, 1]


def test_each_caption_comes_with_its_picture(
    data: DataConfig, tokenizer: KosmosTokenizer, picture: Callable[..., bytes]
) -> None:
    seen = set()
    for batch in (batch for step in read(data, ONE_RANK, 0, 3) for batch in step):
        for (row, column), image in zip(batch.image_positions.tolist(), batch.images, strict=True):
            if batch.sources[row] == SOURCE_KINDS.index("caption"):
                ids = batch.input_ids[row, column + 5 :]
                caption = tokenizer.decode(ids[: int((ids == tokenizer.eos_id).nonzero()[0])])
                number = int(caption.removeprefix("picture "))
                assert torch.equal(image, load_image(picture(number), 8))
                seen.add(number)
    assert len(seen) > 20


@pytest.mark.parametrize("dp_size, micro_batch_size", [(2, 2), (4, 2), (2, 1), (1, 8)])
def test_a_step_has_the_same_samples_under_any_number_of_ranks(
    data: DataConfig, dp_size: int, micro_batch_size: int
) -> None:
    expected = [[row for batch in step for row in rows_of(batch)] for step in read(data, ONE_RANK, 2, 4)]
    steps: list[list[str]] = [[], []]
    ranks = [
        read(data, BatchGeometry(micro_batch_size, 8, dp_rank=rank, dp_size=dp_size), 2, 4) for rank in range(dp_size)
    ]
    for number in range(2):
        for microbatch in range(8 // dp_size // micro_batch_size):
            for rank in ranks:
                steps[number] += rows_of(rank[number][microbatch])
    assert steps == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_and_the_starting_step_change_nothing(data: DataConfig) -> None:
    expected = [[rows_of(batch) for batch in step] for step in read(data, ONE_RANK, 0, 5)]
    for num_workers in (1, 3):
        parallel = data.model_copy(update={"num_workers": num_workers})
        assert [[rows_of(batch) for batch in step] for step in read(parallel, ONE_RANK, 3, 5)] == expected[3:]
    assert [[rows_of(batch) for batch in step] for step in read(data, ONE_RANK, 4, 5)] == expected[4:]


def test_leaving_early_ends_the_workers(data: DataConfig) -> None:
    loader = StepLoader(data.model_copy(update={"num_workers": 2}), IMAGES, ONE_RANK, seed=5)
    steps = loader.steps(0, 1000)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert multiprocessing.active_children() == []


def test_ranks_without_the_vision_tower_know_where_pictures_are(data: DataConfig) -> None:
    without = replace(ONE_RANK, part=RankPart(images=False))
    blind = StepLoader(data.model_copy(update={"num_workers": 2}), IMAGES, without, seed=5)
    for seeing, other in zip(read(data, ONE_RANK, 0, 1)[0], next(blind.steps(0, 1)), strict=True):
        assert other.images.shape == (0, 3, 8, 8)
        assert torch.equal(other.image_positions, seeing.image_positions)
        assert torch.equal(other.labels, seeing.labels)


@pytest.fixture
def damaged(data: DataConfig) -> DataConfig:
    """The blend with captions alone, where one picture's bytes were overwritten after preparation."""
    captions = data.train[1]
    shard = captions.prefix.parent / "caption-images-00000.tar"
    content = bytearray(shard.read_bytes())
    offset = int(ImageStore(captions.prefix)._offsets[7])
    content[offset : offset + 50] = bytes(50)
    shard.write_bytes(content)
    return data.model_copy(update={"train": (captions,)})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_picture_stops_training_with_its_place(damaged: DataConfig, num_workers: int) -> None:
    where = r"^\S*caption-images-00000\.tar at byte \d+ \(picture 0 of document 7, both counted from 0\): no picture in"
    with pytest.raises(DataError, match=where):
        read(damaged.model_copy(update={"num_workers": num_workers}), ONE_RANK, 0, 10)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_picture_is_shown_blank_and_counted(
    damaged: DataConfig, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = damaged.model_copy(update={"on_bad_document": "skip", "num_workers": num_workers})
    loader = StepLoader(config, IMAGES, ONE_RANK, seed=5)
    batches = [batch for step in loader.steps(0, 4) for batch in step]
    blank = sum(int((batch.images.abs().sum(dim=(1, 2, 3)) == 0).sum()) for batch in batches)
    assert loader.num_bad_images == blank > 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == blank
    assert all("a picture is shown blank: " in message and "of document 7" in message for message in messages)


def test_documents_with_too_many_pictures(data: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Two pictures of 31 slots don't fit 64 tokens."""
    images = ImageFormat(num_latents=31, size=8)
    with pytest.raises(DataError, match=r"interleaved: document 0 .* 2 pictures of 31 slots"):
        StepLoader(data, images, ONE_RANK, seed=5)
    captions_only = data.model_copy(update={"train": data.train[1:2]})
    assert StepLoader(captions_only, images, ONE_RANK, seed=5) is not None
    with pytest.raises(DataError, match="interleaved: document 0"):  # nothing of that corpus would be left
        StepLoader(data.model_copy(update={"on_bad_document": "skip"}), images, ONE_RANK, seed=5)


def test_a_batch_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="global_batch_size=6 is not a multiple of micro_batch_size=2 x 2"):
        BatchGeometry(micro_batch_size=2, global_batch_size=6, dp_size=2)


def test_heldout_batches_hold_each_row_once(data: DataConfig) -> None:
    corpus = data.heldout[0]
    geometries = [BatchGeometry(2, 8, dp_rank=rank, dp_size=2) for rank in range(2)]
    ranks = [list(heldout_batches(data, corpus, IMAGES, geometry, num_sequences=1000)) for geometry in geometries]
    assert len({tuple(len(step) for step in rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for step in rank for batch in step]
    targets = sum(batch.num_target_tokens for batch in batches)
    tokenizer = KosmosTokenizer.load(data.tokenizer)
    assert targets == sum(len(tokenizer.encode(f"picture {number}")) + 1 for number in range(NUM_CAPTIONS))
    empty = [row for batch in batches for row in batch.loss_mask if not row.any()]
    assert 0 < len(empty) < 8  # what fills the last step up

    (step,) = heldout_batches(data, corpus, IMAGES, ONE_RANK, num_sequences=3)
    assert [batch.loss_mask.any(dim=1).tolist() for batch in step] == [
        [True, True],
        [True, False],
        [False] * 2,
        [False] * 2,
    ]
    assert rows_of(step[0])[0] == rows_of(ranks[0][0][0])[0]


def test_heldout_captions(data: DataConfig, picture: Callable[..., bytes]) -> None:
    pairs = heldout_captions(data, data.heldout[0], 3)
    assert [caption for _, caption in pairs] == ["picture 0", "picture 1", "picture 2"]
    assert all(torch.equal(load_image(pair[0], 8), load_image(picture(number), 8)) for number, pair in enumerate(pairs))
    assert len(heldout_captions(data, data.heldout[0], 1000)) == NUM_CAPTIONS
    with pytest.raises(DataError, match="holds text documents; captions need"):
        heldout_captions(data, data.train[0], 1)


def test_heldout_captions_name_a_bad_picture(damaged: DataConfig) -> None:
    with pytest.raises(DataError, match=r"of document 7, .*\): no picture in"):
        heldout_captions(damaged, damaged.train[0], 10)


def test_another_tokenizer_is_refused_by_fingerprint(data: DataConfig, tmp_path: Path) -> None:
    train_tokenizer(["some other text"] * 3, TrainingSettings(273)).save(tmp_path / "other")
    with pytest.raises(DataError, match="was prepared with another tokenizer"):
        StepLoader(data.model_copy(update={"tokenizer": tmp_path / "other"}), IMAGES, ONE_RANK, seed=5)
