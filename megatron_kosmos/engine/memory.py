"""Bytes that weights, gradients and optimizer state take on a rank: what DeepSpeed 0.19 allocates for our settings.

For N parameters on a rank, T of them trained, S in tensors too small to be cut, and d data ranks:

| ZeRO | weights (w = 4 in fp32, 2 in bf16) | gradients | optimizer state |
|---|---|---|---|
| 0, fp32 | w·N | 4·T | 8·T: two moments |
| 1 | w·N | 4·T | 12·T/d: fp32 master and two moments |
| 2 | w·N | 4·T/d | 12·T/d |
| 3 | w·N/d + w·S | 4·T/d | 12·T/d |

With `optimizer.kind: adamw_8bit` two moments take 2 1/32 bytes instead of 8: a byte each, and an fp32 scale for every
256 elements; those of embeddings and small tensors keep 8. In the memory of the host each rank keeps its share of a
checkpoint, 4·N + 8·T over all ranks that hold the same. Gradients are fp32 sums in both precisions. Not counted:
activations, tables of positions, communication buckets, weights that ZeRO 3 has gathered for the moment, a few elements
of padding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megatron_kosmos.config import RunConfig
from megatron_kosmos.model.names import NamedParameter
from megatron_kosmos.optim.groups import settings_of

_WIDTH = {"fp32": 4, "bf16": 2}
_GRADIENT, _MASTER, _MOMENTS = 4, 4, 8
_MOMENTS_8BIT = 2 * (1 + 4 / 256)


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


def rank_memory(named: Iterable[NamedParameter], run: RunConfig, dp_size: int) -> RankMemory:
    """Return what a rank with the parameters `named`, its tensor-parallel parts, holds under `dp_size` data ranks.

    The parameters may be on the meta device, but ZeRO must not have cut them yet.
    """
    stage = run.parallel.zero_stage
    parameters = list(named)
    trained = [one for one in parameters if one.parameter.requires_grad]
    weights = sum(one.parameter.numel() for one in parameters)
    num_trained = sum(one.parameter.numel() for one in trained)
    if stage == 3:
        smallest = DeepSpeedZeroConfig().param_persistence_threshold
        kept_whole = sum(one.parameter.numel() for one in parameters if one.parameter.numel() <= smallest)
        weights = -(-weights // dp_size) + kept_whole
    optimizer = sum(one.parameter.numel() * _state_width(run, _moments_of(one, run)) for one in trained)
    return RankMemory(
        weights=_WIDTH[run.training.precision] * weights,
        gradients=_GRADIENT * (num_trained if stage <= 1 else -(-num_trained // dp_size)),
        optimizer=math.ceil(optimizer / (dp_size if stage else 1)),
    )


def snapshot_bytes(named: Iterable[NamedParameter], tp_size: int, dp_size: int) -> int:
    """Return the host memory that a rank with the parameters `named` copies its share of a checkpoint to.

    The ranks that hold the same share it evenly: `dp_size`, and `tp_size` times as many where nothing is cut.
    """
    total = 0.0
    for one in named:
        if not one.is_tied_copy:
            num_holders = dp_size if one.shard_dim is not None else dp_size * tp_size
            total += one.parameter.numel() * (_MASTER + _MOMENTS * one.parameter.requires_grad) / num_holders
    return math.ceil(total)


def _moments_of(one: NamedParameter, run: RunConfig) -> float:
    """Return the bytes of two moments of an element."""
    if run.optimizer.kind == "adamw" or settings_of(one.name, one.parameter, run.optimizer).keeps_32_bits:
        return _MOMENTS
    return _MOMENTS_8BIT


def memory_formula(run: RunConfig, dp_size: int) -> str:
    """Return what `rank_memory` computes, in words: bytes for N parameters of a rank, T of them trained."""
    width, stage = _WIDTH[run.training.precision], run.parallel.zero_stage
    weights = f"{width} N" if stage < 3 else f"{width} N / {dp_size} (and {width} for each that ZeRO doesn't cut)"
    gradients = f"{_GRADIENT} T" if stage <= 1 else f"{_GRADIENT} T / {dp_size}"
    optimizer = f"{_state_width(run, _MOMENTS):g} T" + (f" / {dp_size}" if stage else "")
    legend = "N parameters on the rank, T trained"
    if run.optimizer.kind == "adamw_8bit":
        optimizer = f"{_state_width(run, _MOMENTS_8BIT):g} (T - E) + {_state_width(run, _MOMENTS):g} E"
        optimizer = f"({optimizer}) / {dp_size}" if stage else optimizer
        legend += ", E of those in embeddings and small tensors"
    return f"bytes: weights {weights}, gradients {gradients}, optimizer {optimizer}\n{legend}"


def _state_width(run: RunConfig, moments: float) -> float:
    """Return the bytes that the optimizer keeps for a parameter: `moments`, and under ZeRO the master."""
    return moments + (_MASTER if run.parallel.zero_stage else 0)
