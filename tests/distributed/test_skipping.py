"""A step whose loss or gradients are not finite on one rank is no step on any rank, under every layout."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.model.loss import TokenLosses
from megatron_kosmos.parallel.topology import Topology, build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

pytestmark = pytest.mark.distributed

TP2, PP2 = {"parallel__tensor_parallel_size": 2}, {"parallel__pipeline_parallel_size": 2}
BF16 = {"training__precision": "bf16"}
IN_PIECES, ALIKE = "decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.input_layernorm.weight"
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "dp2_zero0": (2, {"parallel__zero_stage": 0}, IN_PIECES),
    "dp2_zero0_8bit": (2, {"parallel__zero_stage": 0, "optimizer__kind": "adamw_8bit"}, IN_PIECES),
    "dp2_zero1": (2, {"parallel__zero_stage": 1}, IN_PIECES),
    "dp2_zero1_bf16": (2, {"parallel__zero_stage": 1, **BF16}, IN_PIECES),
    "dp2_zero1_bf16_8bit": (2, {"parallel__zero_stage": 1, "optimizer__kind": "adamw_8bit", **BF16}, IN_PIECES),
    "dp2_zero2_bf16": (2, {"parallel__zero_stage": 2, **BF16}, IN_PIECES),
    "dp2_zero3": (2, {"parallel__zero_stage": 3}, IN_PIECES),
    "dp2_zero3_bf16": (2, {"parallel__zero_stage": 3, **BF16}, IN_PIECES),
    "pp2": (2, PP2, IN_PIECES),
    "tp2": (2, TP2, ALIKE),
    "tp2_zero0": (2, {"parallel__zero_stage": 0, **TP2}, ALIKE),
    "tp2_zero2": (2, {"parallel__zero_stage": 2, **TP2}, ALIKE),
    "tp2_zero3_bf16": (2, {"parallel__zero_stage": 3, **TP2, **BF16}, ALIKE),
    "tp2_pp2_bf16": (4, {**TP2, **PP2, **BF16}, ALIKE),
}
"""Ranks, settings, and the weight whose gradient on the last rank is bad: cut by tensor ranks, or alike on them and
then only in the norm of the first."""


def poison(stage: Stage, where: str) -> list[Any]:
    """Make the last rank's gradient of a weight, or its loss, bad from here on."""
    if where != "loss":
        (weight,) = (named.parameter for named in stage.named if named.name == where)
        return [weight.register_hook(lambda gradient: gradient * torch.nan)]

    def lose(module: torch.nn.Module, inputs: Any, losses: TokenLosses) -> TokenLosses:
        return TokenLosses(losses.total + torch.inf, losses.each_BT + torch.inf)

    return [stage.chunks[-1].register_forward_hook(lose)]


def state_of(stage: Stage, topology: Topology) -> dict[str, Tensor]:
    """Everything that a step changes, as this rank has it."""
    optimizer, state = stage.optimizer.state, {"updates": torch.tensor(stage.optimizer.state.updates)}
    for one in stage.named:
        if one.parameter.requires_grad:
            state |= {f"{one.name}/{key}": value.clone() for key, value in optimizer.read(one.parameter).items()}
        state[one.name] = optimizer.frozen_weight(one.parameter).clone()
    return state


def train_with_a_bad_step(run: RunConfig, where: str) -> tuple[list[tuple[float, float]], list[str], list[bool]]:
    """Return losses and norms of four steps, the third bad, what that one changed, and which were skipped."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    runner = StepRunner(run, stage, topology)
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    series, skipped, changed = [], [], ["everything"]
    for step in range(4):
        hooks = poison(stage, where) if step == 2 and is_last else []
        before = state_of(stage, topology)
        result = runner.train(step, rank_batches(step, "timm", topology))
        after = state_of(stage, topology)
        for hook in hooks:
            hook.remove()
        series.append((result.sums.mean, result.grad_norm))
        skipped.append(result.is_skipped)
        if step == 2:
            changed = [key for key in before if not torch.equal(before[key], after[key])]
        else:
            assert not torch.equal(before["updates"], after["updates"])
    return series, changed, skipped


@pytest.mark.parametrize("case", CASES)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(case: str) -> None:
    world_size, changes, weight = CASES[case]
    ranks = run_ranks(train_with_a_bad_step, world_size, tiny_run(**changes), weight)
    series, _, _ = ranks[0]
    assert math.isnan(series[2][1])
    assert all(math.isfinite(loss) and math.isfinite(norm) for loss, norm in (*series[:2], series[3]))
    for of_rank, changed, skipped in ranks:
        assert str(of_rank) == str(series)  # NaN is not equal to itself
        assert (changed, skipped) == ([], [False, False, True, False])


@pytest.mark.parametrize("case", ["dp2_zero1_bf16", "dp2_zero3", "pp2", "tp2"])
def test_a_loss_that_is_not_finite_skips_the_step_though_gradients_are(case: str) -> None:
    world_size, changes, _ = CASES[case]
    ranks = run_ranks(train_with_a_bad_step, world_size, tiny_run(**changes), "loss")
    assert len({str(of_rank) for of_rank, _, _ in ranks}) == 1
    for of_rank, changed, skipped in ranks:
        assert math.isinf(of_rank[2][0]) == (case != "tp2")  # the loss that is told is that of tensor rank 0
        assert (changed, skipped) == ([], [False, False, True, False])
