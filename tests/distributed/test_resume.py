"""A resumed run goes on as if it had never stopped: same layout, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

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
        result = runner.train(step, rank_batches(step, pattern, topology.dp_rank, topology.dp_size))
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
