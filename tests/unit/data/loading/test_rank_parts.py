"""A rank reads what it needs and no more, and what it has is the same as where everything is read."""

import faulthandler
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, RankPart, StepLoader
from megatron_kosmos.prompt import SourceKind

TOKENS = ("input_ids", "labels")
MIDDLE = RankPart(tokens=False, images=False)


@pytest.fixture
def data(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path) -> DataConfig:
    """A blend of the three kinds, with texts longer than a row and rows with several pictures."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "text": [{"text": f"{number} bottles of beer on the wall " * (number % 9 + 1)} for number in range(30)],
        "caption": [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(9)],
        "interleaved": [
            {"parts": [{"image": f"{number % 9}.png"}, {"text": "and so on " * (number + 1)}, {"image": "3.png"}]}
            for number in range(12)
        ],
    }
    return DataConfig(tokenizer=tokenizer_folder, sequence_length=64, train=prepare_blend(lines, 9), num_workers=0)


def open_loader(data: DataConfig, part: RankPart) -> StepLoader:
    return StepLoader(data, ImageFormat(4, 8), BatchGeometry(4, 8, part=part), seed=5)


def read(data: DataConfig, part: RankPart, num_steps: int = 5) -> list[MultimodalBatch]:
    return [batch for step in open_loader(data, part).steps(0, num_steps) for batch in step]


def same_but_for(batch: MultimodalBatch, other: MultimodalBatch, *names: str) -> bool:
    others = [field.name for field in fields(MultimodalBatch) if field.name not in names]
    return all(torch.equal(getattr(batch, name), getattr(other, name)) for name in others)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "best_fit_decreasing"])
def test_every_rank_has_the_same_metadata(data: DataConfig, packing: Packing) -> None:
    data = data.model_copy(update={"packing": packing, "document_mask": packing != "best_fit"})
    whole = read(data, RankPart())
    assert sum(len(batch.images) for batch in whole) > 20
    for expected, batch in zip(whole, read(data, MIDDLE), strict=True):
        assert same_but_for(batch, expected, *TOKENS, "images")
        assert batch.input_ids.shape == batch.labels.shape == (4, 0)
        assert batch.images.shape == (0, 3, 8, 8)
        assert batch.num_target_tokens == expected.num_target_tokens > 0
        assert batch.masks_documents == expected.masks_documents
    for expected, batch in zip(whole, read(data, replace(MIDDLE, tokens=True)), strict=True):
        assert same_but_for(batch, expected, "images")


@pytest.mark.parametrize("tp_size", [2, 3])
def test_tensor_ranks_decode_each_picture_once(data: DataConfig, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(data, RankPart())
    decoded: list[int] = []
    read_picture = ImageStore.read

    def read_and_count(store: ImageStore, image: int) -> bytes:
        decoded.append(image)
        return read_picture(store, image)

    monkeypatch.setattr(ImageStore, "read", read_and_count)
    parts = [RankPart(tokens=rank == 0, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    ranks = [read(data, part) for part in parts]
    assert len(decoded) == sum(len(batch.images) for batch in whole)
    for number, expected in enumerate(whole):
        for rank, batches in enumerate(ranks):
            share = expected.for_tensor_rank(rank, tp_size)
            assert same_but_for(batches[number], share, *(TOKENS if rank else ()))
        assert torch.equal(torch.cat([batches[number].images for batches in ranks]), expected.images)


def ends_after_the_files_are_gone(data: DataConfig, part: RankPart) -> int:
    """Return how a process ends that reads batches after all tokens and pictures behind its back have gone.

    To read of a file that has become too short is the end of a process, by a signal that nothing can catch.
    """
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.disable()
        try:
            loader = open_loader(data, part)
            for corpus in data.train:
                os.truncate(f"{corpus.prefix}.bin", 0)
                for shard in corpus.prefix.parent.glob(f"{corpus.prefix.name}-images-*.tar"):
                    shard.unlink()
            code = 0 if sum(batch.num_target_tokens for step in loader.steps(0, 5) for batch in step) else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("part, code", [(MIDDLE, 0), (replace(MIDDLE, tokens=True), -7), (RankPart(tokens=False), 1)])
def test_a_middle_stage_reads_neither_tokens_nor_pictures(data: DataConfig, part: RankPart, code: int) -> None:
    """-7 is SIGBUS for tokens that are gone, 1 an error for pictures."""
    assert ends_after_the_files_are_gone(data, part) == code
