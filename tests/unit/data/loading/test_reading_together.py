"""Training on prepared corpora is the same under every layout, and all ranks end where one cannot read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import ConfigError, CorpusConfig, RunConfig
from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.loading.loader import ImageFormat, StepLoader
from megatron_kosmos.engine.preflight import check_before_start
from megatron_kosmos.engine.reading import ReadingFailed, geometry_of, read_together
from megatron_kosmos.engine.run import train
from megatron_kosmos.parallel.agreement import agree
from megatron_kosmos.parallel.topology import Topology, build_topology
from megatron_kosmos.prompt import SourceKind
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LATENTS, SIDE, tiny_run

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel_size": 2}),
    "pp4": (4, {"pipeline_parallel_size": 4}),
    "pp2_vpp2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}
MakeRun = Callable[..., RunConfig]


@pytest.fixture
def make_run(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path, tmp_path: Path) -> MakeRun:
    """Makes the tiny model's run on a blend of the three kinds, under a layout."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "text": [{"text": f"{number} bottles of beer on the wall"} for number in range(30)],
        "caption": [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(9)],
        "interleaved": [
            {"parts": [{"text": "see"}, {"image": f"{number % 9}.png"}, {"text": "and so on " * number}]}
            for number in range(12)
        ],
    }
    corpora = [corpus.model_dump() for corpus in prepare_blend(lines, 9)]

    def make(name: str, layout: dict[str, Any], **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "run_dir": tmp_path / name,
            "data": {"tokenizer": tokenizer_folder, "sequence_length": 64, "train": corpora, "num_workers": 1},
            "model__decoder__vocab_size": 400,
            "model__decoder__max_sequence_length": 64,
            "training__steps": 3,
            **{f"parallel__{key}": value for key, value in layout.items()},
        }
        return tiny_run(**settings | changes)

    return make


def loader_of(run: RunConfig, topology: Topology) -> StepLoader:
    return StepLoader(run.data, ImageFormat(LATENTS, SIDE), geometry_of(run, topology), run.training.seed)


def read_rank(run: RunConfig) -> tuple[Topology, list[MultimodalBatch]]:
    topology = build_topology(run.parallel, CPU)
    steps = read_together(loader_of(run, topology).steps(0, 3), topology)
    return topology, [batch for step in steps for batch in step]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_what_its_place_needs(make_run: MakeRun, layout: str) -> None:
    ((_, whole),) = run_ranks(read_rank, 1, make_run("one", {}))
    world_size, parallel = LAYOUTS[layout]
    for topology, batches in run_ranks(read_rank, world_size, make_run(layout, parallel)):
        for batch, expected in zip(batches, whole, strict=True):
            assert torch.equal(batch.loss_mask, expected.loss_mask)
            if topology.is_first_stage or topology.is_last_stage:
                assert torch.equal(batch.input_ids, expected.input_ids)
                assert torch.equal(batch.labels, expected.labels)
            else:
                assert batch.input_ids.numel() == batch.labels.numel() == 0
            share = expected.for_tensor_rank(topology.tp_rank, topology.tp_size).images
            assert torch.equal(batch.images, share if topology.is_first_stage else share[:0])


def train_rank(run: RunConfig) -> str | None:
    """Train; return what the rank raised."""
    try:
        train(run, CPU)
    except ReadingFailed as error:
        return str(error)
    return None


def metrics_of(world_size: int, run: RunConfig) -> list[dict[str, Any]]:
    """Train and return the metrics of every step."""
    assert run_ranks(train_rank, world_size, run) == [None] * world_size
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_training_on_corpora_is_that_of_one_process(make_run: MakeRun) -> None:
    world_size, parallel = LAYOUTS["tp2_pp2"]
    one = make_run("one", {})
    heldout = {"heldout": [corpus.model_dump() for corpus in one.data.train[1:]]}
    changes: dict[str, Any] = {
        "data": one.data.model_dump() | heldout,
        "evaluation": {"every": 2, "sequences": 3, "captions": 3, "caption_tokens": 2, "caption_prompt": ""},
    }
    expected = metrics_of(1, make_run("one", {}, **changes))
    metrics = metrics_of(world_size, make_run("several", parallel, **changes))
    assert len(metrics) == 3
    names = [name for name in expected[-1] if "loss" in name or name in ("grad_norm", "target_tokens", "images")]
    assert {"heldout_loss_caption", "heldout_loss_interleaved", "images"} <= set(names)
    for ours, theirs in zip(metrics, expected, strict=True):
        assert {name: ours.get(name) or 0.0 for name in names} == pytest.approx(
            {name: theirs.get(name) or 0.0 for name in names}, rel=1e-4
        )
        assert ours.get("heldout_caption_exact_match") == theirs.get("heldout_caption_exact_match")
        assert ours["image_text_ratio"] == ours["images"] * LATENTS / ours["target_tokens"]
        assert sum(share for name, share in ours.items() if name.startswith("share_")) == pytest.approx(1)
        assert ours["memory_host_peak"] > 2**20
    assert metrics[-1]["seconds_left"] == 0 < metrics[0]["seconds_left"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_bad_picture_on_one_rank_ends_all_with_its_message(make_run: MakeRun, num_workers: int) -> None:
    run = make_run("bad", LAYOUTS["tp2_pp2"][1], data__num_workers=num_workers, training__steps=40)
    captions = run.data.train[1].prefix
    shard = captions.parent / f"{captions.name}-images-00000.tar"
    content = bytearray(shard.read_bytes())
    offset = int(ImageStore(captions)._offsets[7])
    content[offset : offset + 50] = bytes(50)
    shard.write_bytes(content)
    messages = run_ranks(train_rank, 4, run, timeout_seconds=60)
    assert len(set(messages)) == 1
    assert "images-00000.tar at byte" in messages[0]
    assert "picture 0 of document 7" in messages[0]
    assert messages[0].startswith(("rank 0: ", "rank 1: "))  # the ranks that hold the vision tower


def train_with_a_bad_disk(run: RunConfig, spoilt: Path) -> str | None:
    """Train; rank 1 has the files in `spoilt` in place of the others, as where they are on a disk of each machine."""
    if torch.distributed.get_rank() == 1:
        train_on, heldout = (
            tuple(each.model_copy(update={"prefix": spoilt / each.prefix.name}) for each in corpora)
            for corpora in (run.data.train, run.data.heldout)
        )
        run = run.model_copy(update={"data": run.data.model_copy(update={"train": train_on, "heldout": heldout})})
    return train_rank(run)


@pytest.mark.parametrize("place", ["manifest", "index", "held-out picture"])
def test_what_one_rank_cannot_open_ends_all(make_run: MakeRun, tmp_path: Path, place: str) -> None:
    one = make_run("one", {})
    captions = one.data.train[1]
    changes = {"data": one.data.model_dump() | {"heldout": [captions.model_dump()]}, "evaluation__captions": 9}
    spoilt = Path(shutil.copytree(captions.prefix.parent, tmp_path / "spoilt"))
    offset = int(ImageStore(captions.prefix)._offsets[7])
    ending, position, message = {
        "manifest": (".manifest.json", 0, r"rank 1: .*spoilt.*\.manifest\.json is damaged"),
        "index": (".idx", 0, r"rank 1: .*spoilt.*\.idx is no indexed dataset"),
        "held-out picture": ("-images-00000.tar", offset, r"rank 1: .*document 7"),
    }[place]
    file = spoilt / f"{captions.prefix.name}{ending}"
    content = bytearray(file.read_bytes())
    content[position : position + 8] = bytes(8)
    file.write_bytes(content)
    first, second = run_ranks(train_with_a_bad_disk, 2, make_run("bad", {}, **changes), spoilt, timeout_seconds=60)
    assert first == second
    assert re.match(message, str(first))


def test_broken_metrics_end_all_before_they_are_touched(make_run: MakeRun) -> None:
    run = make_run("run", {})
    run.run_dir.mkdir()
    (run.run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    first, second = run_ranks(train_rank, 2, run, timeout_seconds=60)
    assert first == second
    assert re.match(r"rank 0: .*metrics\.jsonl:2 is not a line of metrics .*; move the file away", str(first))
    assert len((run.run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_held_out_corpora_without_documents_end_all_before_the_first_step(make_run: MakeRun) -> None:
    one = make_run("one", {})
    text = one.data.train[0].model_dump() | {"heldout_fraction": 1e-9}
    run = make_run("run", {}, data=one.data.model_dump() | {"heldout": [text]})
    first, second = run_ranks(train_rank, 2, run, timeout_seconds=60)
    assert first == second
    assert re.match(r"rank 0: .* leaves none of its 30 documents for data\.heldout", str(first))
    assert (run.run_dir / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("num_words, is_refused", [(2, False), (64, True)])
def test_a_prompt_of_captions_leaves_room_for_them(make_run: MakeRun, num_words: int, is_refused: bool) -> None:
    one = make_run("one", {})
    data = one.data.model_dump() | {"heldout": [one.data.train[1].model_dump() | {"heldout_fraction": 0.2}]}
    data["train"][1]["heldout_fraction"] = 0.2
    run = make_run("run", {}, data=data, evaluation__caption_prompt="word " * num_words)
    if not is_refused:
        check_before_start(run, 1)
        return
    with pytest.raises(ConfigError, match=r"evaluation.caption_prompt is \d+ tokens .* data.sequence_length=64"):
        check_before_start(run, 1)


def fail_on(ranks: tuple[int, ...], rank_messages: tuple[str, ...]) -> str | None:
    rank = torch.distributed.get_rank()
    return agree(rank_messages[rank] if rank in ranks else None, False, CPU).failure


@pytest.mark.parametrize("ranks, expected", [((), None), ((2,), r"rank 2: défaut \udcff.jsonl"), ((1, 2), "rank 1: b")])
def test_the_first_rank_that_fails_is_heard(ranks: tuple[int, ...], expected: str | None) -> None:
    assert run_ranks(fail_on, 3, ranks, ("a", "b", "défaut \udcff.jsonl")) == [expected] * 3  # a name that is no UTF-8
