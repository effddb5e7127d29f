"""A resumed run goes on as if it had never stopped: same layout, bit for bit."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.folders import complete_folder
from megatron_kosmos.checkpoint.load import read_tensors
from megatron_kosmos.checkpoint.manifest import STATE_FILE, FileRecord, Manifest
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.tiny import LATENTS, rank_batches, tiny_run

pytestmark = pytest.mark.distributed

DROPOUT = {"model__decoder__dropout": 0.1, "model__decoder__attention_dropout": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_zero0": (2, {"parallel__zero_stage": 0}),
    "dp2_zero1_bf16": (2, {"training__precision": "bf16"}),
    "dp2_zero2": (2, {"parallel__zero_stage": 2}),
    "dp3_zero3": (3, {"parallel__zero_stage": 3, "training__global_batch_size": 12}),
    "dp2_zero3_bf16": (2, {"parallel__zero_stage": 3, "training__precision": "bf16"}),
    "tp2_sp": (2, {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}),
    "pp2_vpp2_tied": (
        2,
        {
            "parallel__pipeline_parallel_size": 2,
            "parallel__virtual_pipeline_parallel_size": 2,
            "model__decoder__tie_embeddings": True,
        },
    ),
    "tp2_pp2_bf16": (
        4,
        {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2, "training__precision": "bf16"},
    ),
}


def train_rank(run: RunConfig, root: Path, stop: int, save_at: int | None) -> list[tuple[float, float]]:
    """Continue from the newest checkpoint in `root` up to step `stop`; return (loss, grad norm) of each step."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    store = CheckpointStore(root, topology, keep_last=1)
    stage, start = build_stage(run, topology, store)
    runner = StepRunner(run, stage, topology)
    series = []
    for step in range(start, stop):
        pattern = "timm eeee ittt" if topology.dp_size < 3 else "timmit eeeeee itttmm"
        result = runner.train(step, rank_batches(step, pattern, topology))
        series.append((result.sums.mean, result.grad_norm))
        if step + 1 == save_at:
            store.save(save_at, stage, {"config": run.model_dump(mode="json")})
    return series


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_is_the_undisturbed_run(layout: str, tmp_path: Path) -> None:
    world_size, changes = LAYOUTS[layout]
    run = tiny_run(**changes, **DROPOUT)
    undisturbed = run_ranks(train_rank, world_size, run, tmp_path, 6, 3)[0]
    resumed = run_ranks(train_rank, world_size, run, tmp_path, 6, None)[0]
    assert len(undisturbed) == 6
    assert resumed == undisturbed[3:]


def test_a_run_is_not_begun_again_over_damaged_checkpoints(tmp_path: Path) -> None:
    run_ranks(train_rank, 2, tiny_run(), tmp_path, 1, 1)
    (complete_folder(tmp_path, 1) / STATE_FILE).unlink()
    with pytest.raises(RankFailure) as failure:
        run_ranks(train_rank, 2, tiny_run(), tmp_path, 2, None)
    assert "is whole (steps 1), and the run is not begun again over them: restore one" in str(failure.value)
    assert complete_folder(tmp_path, 1).is_dir()


@pytest.mark.parametrize(("field", "value"), [("seed", 2), ("global_batch_size", 4)])
def test_another_order_of_the_data_is_refused(field: str, value: int, tmp_path: Path) -> None:
    run_ranks(train_rank, 1, tiny_run(), tmp_path, 1, 1)
    with pytest.raises(RankFailure, match=f"was trained with training.{field}="):
        run_ranks(train_rank, 1, tiny_run(**{f"training__{field}": value}), tmp_path, 2, None)


def test_another_architecture_is_refused_with_its_fields(tmp_path: Path) -> None:
    run_ranks(train_rank, 2, tiny_run(), tmp_path, 1, 1)
    with pytest.raises(RankFailure) as failure:
        run_ranks(train_rank, 2, tiny_run(model__decoder__width=64, model__decoder__ffn_width=128), tmp_path, 2, None)
    assert CheckpointError.__name__ in str(failure.value)
    assert "model.decoder.width: 32 in the checkpoint, 64 now" in str(failure.value)
    assert "model.decoder.ffn_width: 64 in the checkpoint, 128 now" in str(failure.value)


FREEZING: dict[str, list[dict[str, Any]]] = {
    "less": [{"parameters": ["vision_tower.*"], "frozen": True}],
    "more": [{"parameters": ["decoder.layers.[0-2].*", "resampler.*", "vision_tower.*"], "frozen": True}],
}
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_zero1_bf16": (2, {"training__precision": "bf16"}),
    "dp2_zero3": (2, {"parallel__zero_stage": 3}),
    "pp2": (2, {"parallel__pipeline_parallel_size": 2}),
}


def state_after_resume(run: RunConfig, root: Path) -> tuple[dict[str, dict[str, torch.Tensor]], int, list[str]]:
    """Return what a resumed rank has of each parameter, its count of updates and what it logged; then train a step."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_kosmos").addHandler(handler)
    logging.getLogger("megatron_kosmos").setLevel(logging.INFO)
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, start = build_stage(run, topology, CheckpointStore(root, topology, keep_last=1))
    optimizer = stage.optimizer.state
    state = {
        one.name: {key: tensor.clone() for key, tensor in optimizer.read(one.parameter).items()}
        if one.parameter.requires_grad
        else {"master": optimizer.frozen_weight(one.parameter).clone()}
        for one in stage.named
    }
    updates = optimizer.updates
    batches = rank_batches(start, "timm", topology)
    result = StepRunner(run, stage, topology).train(start, batches)
    assert result.grad_norm > 0
    return state, updates, messages


@pytest.mark.parametrize("layout", RESUMED)
@pytest.mark.parametrize(("before", "after"), [("less", "more"), ("more", "less")])
def test_what_is_frozen_may_change(before: str, after: str, layout: str, tmp_path: Path) -> None:
    world_size, changes = RESUMED[layout]
    saving = tiny_run(**changes, optimizer__groups=FREEZING[before])
    run_ranks(train_rank, world_size, saving, tmp_path, 2, 2)
    saved = dict(read_tensors(complete_folder(tmp_path, 2)))
    run = tiny_run(**changes, optimizer__groups=FREEZING[after])
    ranks = run_ranks(state_after_resume, world_size, run, tmp_path)

    state = {name: tensors for of_rank, _, _ in ranks for name, tensors in of_rank.items()}
    assert {f"model/{name}" for name in state} == {name for name in saved if name.startswith("model/")}
    was_trained = {name for name in state if f"optimizer/{name}/exp_avg" in saved}
    newly_trained = {name for name, tensors in state.items() if len(tensors) == 3} - was_trained
    assert bool(newly_trained) == (after == "less")
    for name, tensors in state.items():
        expected = {"master": saved[f"model/{name}"]}
        if "exp_avg" in tensors:
            zero = torch.zeros_like(expected["master"])
            expected |= {key: saved.get(f"optimizer/{name}/{key}", zero) for key in ("exp_avg", "exp_avg_sq")}
        elif run.training.precision == "bf16":
            expected["master"] = expected["master"].bfloat16()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), name

    assert {updates for _, updates, _ in ranks} == {1}  # the second step had no target
    what = "newly trained, with moments of zero" if after == "less" else "newly frozen, as saved"
    number = len(newly_trained) or len(was_trained - {name for name, tensors in state.items() if len(tensors) == 3})
    for _, _, messages in ranks:
        (message,) = [message for message in messages if "newly" in message]
        assert message.startswith(f"{what}: {number} tensors of ")


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_precision_may_change(before: str, after: str, tmp_path: Path) -> None:
    """Masters, moments and the count of updates are those that were saved, bit for bit, and that is said."""
    run_ranks(train_rank, 2, tiny_run(training__precision=before), tmp_path, 2, 2)
    saved = dict(read_tensors(complete_folder(tmp_path, 2)))
    ranks = run_ranks(state_after_resume, 2, tiny_run(training__precision=after, parallel__zero_stage=2), tmp_path)
    for state, updates, messages in ranks:
        assert updates == 1
        assert sum(len(tensors) == 3 for tensors in state.values()) > 20
        for name, tensors in state.items():
            if len(tensors) == 3:
                assert torch.equal(tensors["master"], saved[f"model/{name}"])
                assert all(
                    torch.equal(tensors[key], saved[f"optimizer/{name}/{key}"]) for key in tensors.keys() - {"master"}
                )
        changed = [message for message in messages if "in the checkpoint" in message]
        assert changed[0] == "parallel.zero_stage is 2, was 1 in the checkpoint"
        assert changed[1].startswith(
            f"training.precision is '{after}', was '{before}' in the checkpoint: masters and mom"
        )


def test_a_checkpoint_without_a_weight_of_the_model_is_refused(tmp_path: Path) -> None:
    """Also where the weight that it lacks would be newly trained: moments may be missing, weights may not."""
    run = tiny_run(model__decoder__num_layers=3)
    run_ranks(train_rank, 1, run, tmp_path, 1, 1)
    folder = complete_folder(tmp_path, 1)
    state = json.loads((folder / STATE_FILE).read_text())
    state["config"]["model"]["decoder"]["num_layers"] = 4
    (folder / STATE_FILE).write_text(json.dumps(state))
    manifest = Manifest.read(folder)
    files = manifest.files | {STATE_FILE: FileRecord.of(folder / STATE_FILE)}
    manifest.model_copy(update={"files": files}).write(folder)
    with pytest.raises(RankFailure, match=r"model/decoder\.layers\.3\.\S+ \[.*\] is missing from the checkpoint"):
        run_ranks(train_rank, 1, tiny_run(), tmp_path, 2, None)


def test_another_kind_of_resampler_is_refused_with_its_fields(tmp_path: Path) -> None:
    run_ranks(train_rank, 1, tiny_run(), tmp_path, 1, 1)
    other = {"kind": "cross_attention", "num_latents": LATENTS, "num_heads": 4}
    with pytest.raises(RankFailure) as failure:
        run_ranks(train_rank, 1, tiny_run(model__resampler=other), tmp_path, 2, None)
    assert "model.resampler.kind: 'perceiver' in the checkpoint, 'cross_attention' now" in str(failure.value)
    assert "model.resampler.depth: 2 in the checkpoint, absent now" in str(failure.value)
    assert "attention_dropout" not in str(failure.value)
