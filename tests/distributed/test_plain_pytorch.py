"""One process trains as a plain PyTorch loop does: the loss over all of a step's targets, clipping, AdamW, schedule.

The layouts are compared with one process; a mistake that all of them make shows only here.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, build_stage, derive_transformer_config
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import step_batches, tiny_run

pytestmark = pytest.mark.distributed

PATTERN = "timm itti"
LEARNING_RATES = [0.005, 0.01, 0.01, 0.00875]
"""Two steps of warm-up to 0.01, then linearly to zero at step 10."""
UNDECAYED = ("bias", "norm", "layrnorm", "latents", "frame_embedding", "position_embedding", "class_embedding")

Series = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def train_plainly(run: RunConfig) -> tuple[Series, dict[str, torch.Tensor]]:
    """Train without schedule and DeepSpeed; return the series and the weights by global name."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (model,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(model, run.training.seed)
    named = {one.name: one.parameter for one in named_parameters(model) if one.parameter.requires_grad}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named.items():
        groups[not any(word in name for word in UNDECAYED)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    series = []
    for step, rate in enumerate(LEARNING_RATES):
        batches = step_batches(step, PATTERN)
        num_targets = sum(batch.num_target_tokens for batch in batches)
        loss = torch.stack([model(batch).total for batch in batches]).sum() / num_targets
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(named.values(), run.optimizer.clip_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        series.append((loss.item(), norm.item()))
    return series, {name: parameter.detach().clone() for name, parameter in named.items()}


def train_with_stage(run: RunConfig) -> tuple[Series, dict[str, torch.Tensor]]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    runner = StepRunner(run, stage, topology)
    series = []
    for step, rate in enumerate(LEARNING_RATES):
        result = runner.train(step, step_batches(step, PATTERN))
        assert result.learning_rate == pytest.approx(rate)
        series.append((result.sums.mean, result.grad_norm))
    return series, {one.name: one.parameter.detach() for one in stage.named if one.parameter.requires_grad}


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("clip", [0.5, 0.0], ids=["clipped", "not_clipped"])
def test_training_is_that_of_a_plain_loop(clip: float, zero_stage: int) -> None:
    changes: dict[str, Any] = {"optimizer__clip_grad_norm": clip, "parallel__zero_stage": zero_stage}
    run = tiny_run(**changes)
    (plain,) = run_ranks(train_plainly, 1, run)
    (staged,) = run_ranks(train_with_stage, 1, run)
    torch.testing.assert_close(torch.tensor(staged[0]), torch.tensor(plain[0]), atol=2e-6, rtol=2e-6)
    assert min(norm for _, norm in plain[0]) > 0.5, "nothing to clip"
    assert staged[1].keys() == plain[1].keys()
    for name, weight in plain[1].items():
        # Adam divides by the root of a second moment that rounding reaches where the gradient is zero in truth.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(staged[1][name], weight, atol=2e-5, rtol=1e-4, msg=name)


def norm_of_broken_weights(run: RunConfig) -> float:
    """Train a step from a weight that is not a number; return the gradient norm."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    with torch.no_grad():
        stage.named[-1].parameter[0] = torch.nan
    return StepRunner(run, stage, topology).train(0, step_batches(0, "timm")).grad_norm


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_shows(zero_stage: int) -> None:
    (norm,) = run_ranks(norm_of_broken_weights, 1, tiny_run(parallel__zero_stage=zero_stage))
    assert not math.isfinite(norm)
