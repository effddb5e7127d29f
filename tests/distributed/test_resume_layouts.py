"""A run that is saved under one layout goes on under any other as if it had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

pytestmark = pytest.mark.distributed

Series = list[tuple[float, float]]
"""Loss and gradient norm of each step."""

NUM_STEPS, SAVED_AT = 10, 5
TP2_PP2 = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1_pp1_dp1": (1, {}),
    "dp2_zero1": (2, {"parallel__zero_stage": 1}),
    "dp2_zero2": (2, {"parallel__zero_stage": 2}),
    "dp2_zero3": (2, {"parallel__zero_stage": 3}),
    "dp2_zero0": (2, {"parallel__zero_stage": 0}),
    "tp4": (4, {"parallel__tensor_parallel_size": 4}),
    "pp4": (4, {"parallel__pipeline_parallel_size": 4}),
    "tp2_dp2_sp": (4, {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}),
    "pp2_vpp2": (2, {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2}),
}
EVERY_DAY = ("dp2_zero3", "pp2_vpp2")


def train_rank(run: RunConfig, root: Path, save_at: int, save_in: Path) -> Series:
    """Continue from the newest checkpoint in `root` to step 10, with a save on the way."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, start = build_stage(run, topology, CheckpointStore(root, topology, keep_last=1))
    runner = StepRunner(run, stage, topology)
    series = []
    for step in range(start, NUM_STEPS):
        result = runner.train(step, rank_batches(step, "timm ittt dmtt", topology))
        series.append((result.sums.mean, result.grad_norm))
        if step + 1 == save_at:
            state = {"config": run.model_dump(mode="json")}
            CheckpointStore(save_in, topology, keep_last=1).save(save_at, stage, state)
    return series


def train(world_size: int, run: RunConfig, root: Path, save_at: int, save_in: Path) -> Series:
    """Return the series of rank 0, which is every rank's."""
    series, *others = run_ranks(train_rank, world_size, run, root, save_at, save_in)
    assert all(other == series for other in others)
    return series


def assert_same(series: Series, expected: Series) -> None:
    """Within what is asked of the layouts of one run: max(2e-6, 5e-7 |x|)."""
    assert len(series) == len(expected)
    for number, (values, wanted) in enumerate(zip(series, expected, strict=True)):
        assert values == pytest.approx(wanted, abs=2e-6, rel=5e-7), f"step {NUM_STEPS - len(series) + number + 1}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Series, Path]:
    """Ten steps at TP2·PP2, and the folder with its checkpoint of step 5."""
    root = tmp_path_factory.mktemp("undisturbed")
    return train(4, tiny_run(**TP2_PP2), root, SAVED_AT, root), root


@pytest.mark.parametrize(
    "layout", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.nightly) for name in LAYOUTS]
)
def test_another_layout_goes_on_with_the_same_numbers_and_back(
    layout: str, undisturbed: tuple[Series, Path], tmp_path: Path
) -> None:
    """Steps 6 to 10 under another layout; and from its step 7 on, 8 to 10 under the first again."""
    expected, root = undisturbed
    world_size, changes = LAYOUTS[layout]
    assert_same(train(world_size, tiny_run(**changes), root, 7, tmp_path), expected[SAVED_AT:])
    assert_same(train(4, tiny_run(**TP2_PP2), tmp_path, 9, tmp_path / "unused"), expected[7:])
