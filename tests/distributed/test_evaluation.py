"""Held-out losses and likeliest tokens are the same under every layout, and free of dropout."""

from typing import Any

import pytest
import torch

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.train_step import LossSums, StepRunner
from megatron_kosmos.parallel.topology import build_topology
from megatron_kosmos.prompt import SOURCE_KINDS
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, step_batches, tiny_run

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_zero3": (2, {"parallel__zero_stage": 3}),
    "tp2_sp": (2, {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}),
    "pp2": (2, {"parallel__pipeline_parallel_size": 2}),
    "pp2_vpp2": (2, {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2}),
    "unfused": (1, {"kernels__attention": "unfused"}),
}
DROPOUT = {"model__decoder__dropout": 0.5, "model__decoder__attention_dropout": 0.5}


def evaluate_rank(run: RunConfig) -> tuple[LossSums, list[int]]:
    """Return the losses of four microbatches, and the likeliest tokens after the last position of one."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    runner = StepRunner(run, stage, topology)
    sums = runner.evaluate(rank_batches(0, "timm", topology))
    tokens = runner.likeliest_tokens(step_batches(1, "m")[0], column=run.data.sequence_length - 1)
    return sums, tokens.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_measures_what_one_process_does(layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    ((expected, expected_tokens),) = run_ranks(evaluate_rank, 1, tiny_run())
    for sums, tokens in run_ranks(evaluate_rank, world_size, tiny_run(**changes, **DROPOUT)):
        assert sums.targets == expected.targets
        assert sums.losses == pytest.approx(expected.losses, rel=1e-5)
        assert tokens == expected_tokens


def losses_by_row(run: RunConfig) -> list[tuple[int, float]]:
    """Return (source, summed loss) of every row of the four microbatches, straight from the model."""
    stage, _ = build_stage(run, build_topology(run.parallel, torch.device("cpu")))
    (model,) = stage.chunks
    rows: list[tuple[int, float]] = []
    with torch.no_grad():
        for batch in step_batches(0, "timm"):
            rows += zip(batch.sources.tolist(), model.eval()(batch).each_BT.sum(1).tolist(), strict=True)
    return rows


def test_losses_are_sorted_by_source() -> None:
    ((sums, _),) = run_ranks(evaluate_rank, 1, tiny_run())
    (rows,) = run_ranks(losses_by_row, 1, tiny_run())
    batches = step_batches(0, "timm")
    for index, kind in enumerate(SOURCE_KINDS):
        assert sums.targets[kind] == sum(int(batch.loss_mask[batch.sources == index].sum()) for batch in batches)
        assert sums.losses[kind] == pytest.approx(sum(loss for source, loss in rows if source == index), rel=1e-5)
