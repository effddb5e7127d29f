"""Trains the tiny model under a layout and gathers what must not depend on the layout."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import Topology, build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

NUM_STEPS = 5


@dataclass(frozen=True)
class TrainingRecord:
    """What a layout gave: series by step, and every parameter's whole gradient at step 1 and value at the end."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train_in_ranks(
    world_size: int, pattern: str = "timm", num_steps: int = NUM_STEPS, **changes: Any
) -> TrainingRecord:
    """Train the tiny model on `world_size` ranks with dotted configuration `changes`; see `tiny.step_batches`."""
    run = tiny_run(**changes)
    results = run_ranks(train_rank, world_size, run, pattern, num_steps)
    merged: dict[str, dict[str, Tensor]] = {"gradients": {}, "weights": {}}
    for result in results:
        for key, tensors in merged.items():
            tensors.update(result[key])
    return TrainingRecord(results[0]["losses"], results[0]["grad_norms"], merged["gradients"], merged["weights"])


def train_rank(run: RunConfig, pattern: str, num_steps: int) -> dict[str, Any]:
    """What each rank does; returns its own view of the record."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    runner = StepRunner(run, stage, topology)
    gradients = record_gradients(stage, topology)
    losses, norms = [], []
    for step in range(num_steps):
        result = runner.train(step, rank_batches(step, pattern, topology))
        norms.append(result.grad_norm)
        losses.append(result.sums.mean)
    return {"losses": losses, "grad_norms": norms, "gradients": gradients, "weights": whole_weights(stage, topology)}


def record_gradients(stage: Stage, topology: Topology) -> dict[str, Tensor]:
    """Return a dict that fills with every trained parameter's whole gradient just before the first update.

    Below ZeRO 2 they are taken after finalization and averaged over the data ranks here, as DeepSpeed will.
    At ZeRO 2 and 3 they are what DeepSpeed reduced and cut, through its public accessor.
    """
    optimizer, gradients = stage.optimizer, dict[str, Tensor]()
    # DeepSpeed finalizes in the engine's step and updates in the optimizer's.
    stepper = optimizer.engine.optimizer if optimizer.stage >= 2 else optimizer.engine
    take_step = stepper.step

    def record_then_step() -> None:
        if not gradients:
            for named in stage.named:
                if named.parameter.requires_grad:
                    gradient = _whole_over_data(stage, named.parameter, topology)
                    gradients[named.name] = gather(gradient, named.shard_dim, topology)
        take_step()

    stepper.step = record_then_step
    return gradients


def _whole_over_data(stage: Stage, parameter: nn.Parameter, topology: Topology) -> Tensor:
    if stage.optimizer.stage >= 2:
        return safe_get_full_grad(parameter).float()
    gradient = stage.optimizer.gradient_of(parameter)
    assert gradient is not None
    gradient = gradient.clone().float()
    dist.all_reduce(gradient, group=topology.dp_group)
    return gradient / topology.dp_size


def whole_weights(stage: Stage, topology: Topology) -> dict[str, Tensor]:
    """Return every parameter, gathered from the tensor ranks (and from the data ranks at ZeRO 3)."""
    weights = {}
    for named in stage.named:
        weight = named.parameter.detach()
        if stage.optimizer.stage == 3 and named.parameter.requires_grad:
            weight = safe_get_full_fp32_param(named.parameter)
        elif stage.optimizer.stage == 3:
            continue
        weights[named.name] = gather(weight.float(), named.shard_dim, topology)
    return weights


def gather(part: Tensor, shard_dim: int | None, topology: Topology) -> Tensor:
    """Return the whole tensor from the tensor ranks' parts."""
    if shard_dim is None or topology.tp_size == 1:
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(topology.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=topology.tp_group)
    return torch.cat(parts, dim=shard_dim)
