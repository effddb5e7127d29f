"""Bytes that weights, gradients and optimizer state take on a rank: what DeepSpeed 0.19 allocates for our settings.

For N parameters on a rank, T of them trained, S in tensors too small to be cut, and d data ranks:

| ZeRO | weights (w = 4 in fp32, 2 in bf16) | gradients | optimizer state |
|---|---|---|---|
| 0, fp32 | w·N | 4·T | 8·T: two moments |
| 1 | w·N | 4·T | 12·T/d: fp32 master and two moments |
| 2 | w·N | 4·T/d | 12·T/d |
| 3 | w·N/d + w·S | 4·T/d | 12·T/d |

Gradients are fp32 sums in both precisions. Not counted: activations, tables of positions, communication buckets,
weights that ZeRO 3 has gathered for the moment, a few elements of padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from megatron_kosmos.config import RunConfig

_WIDTH = {"fp32": 4, "bf16": 2}
_GRADIENT, _MASTER, _MOMENTS = 4, 4, 8


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, between the last backward pass of a step and its update."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All that is counted."""
        return self.weights + self.gradients + self.optimizer


def rank_memory(parameters: Iterable[nn.Parameter], run: RunConfig, dp_size: int) -> RankMemory:
    """Return what a rank with `parameters`, its tensor-parallel parts, holds under `dp_size` data ranks.

    The parameters may be on the meta device, but ZeRO must not have cut them yet.
    """
    stage = run.parallel.zero_stage
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    weights = sum(numel for numel, _ in sizes)
    trained = sum(numel for numel, is_trained in sizes if is_trained)
    shared_trained = -(-trained // dp_size)
    if stage == 3:
        smallest = DeepSpeedZeroConfig().param_persistence_threshold
        weights = -(-weights // dp_size) + sum(numel for numel, _ in sizes if numel <= smallest)
    return RankMemory(
        weights=_WIDTH[run.training.precision] * weights,
        gradients=_GRADIENT * (trained if stage <= 1 else shared_trained),
        optimizer=_MOMENTS * trained if stage == 0 else (_MASTER + _MOMENTS) * shared_trained,
    )


def memory_formula(run: RunConfig, dp_size: int) -> str:
    """Return what `rank_memory` computes, in words: bytes for N parameters of a rank, T of them trained."""
    width, stage = _WIDTH[run.training.precision], run.parallel.zero_stage
    weights = f"{width} N" if stage < 3 else f"{width} N / {dp_size} (and {width} for each that ZeRO doesn't cut)"
    gradients = f"{_GRADIENT} T" if stage <= 1 else f"{_GRADIENT} T / {dp_size}"
    optimizer = f"{_MOMENTS} T" if stage == 0 else f"{_MASTER + _MOMENTS} T / {dp_size}"
    return (
        f"bytes: weights {weights}, gradients {gradients}, optimizer {optimizer}\nN parameters on the rank, T trained"
    )
