"""Parameter groups: with which settings each weight is trained, and what a rank without such weights puts there."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_kosmos.config import OptimizerConfig

LEARNING_RATE_SCALE = "learning_rate_scale"
"""Key of a torch group: the factor on the schedule's learning rate."""

KEEPS_32_BITS = "keeps_32_bits"
"""Key of a torch group: whether its moments stay in fp32 where `optimizer.kind` keeps others in 8 bits."""

_UNDECAYED_NAMES = ("position_embedding", "position_embeddings", "class_embedding", "latents", "frame_embedding")
_EMBEDDING = "embedding."
_SMALLEST_WITH_8_BITS = 4096
"""Elements on a rank; bitsandbytes' own bound."""


@dataclass(frozen=True)
class Settings:
    """How a weight is trained. Weights with equal settings form one torch group."""

    learning_rate_scale: float
    weight_decay: float
    keeps_32_bits: bool
    """Whether its moments stay in fp32 beside 8-bit ones."""
    is_sharded: bool
    """Whether tensor parallelism cuts it; told apart where moments have 8 bits. A block of them has one scale: in one
    block with shards, what the tensor ranks hold alike would get another scale, and soon another weight, on each."""


def settings_of(name: str, parameter: nn.Parameter, optimizer: OptimizerConfig) -> Settings:
    """Return how the parameter called `name` is trained, if it is.

    Matrices decay; biases, norms, latents and embeddings of positions don't, whatever their group.
    """
    keeps_32_bits = name.startswith(_EMBEDDING) or parameter.numel() < _SMALLEST_WITH_8_BITS
    has_8_bits = optimizer.kind == "adamw_8bit" and not keeps_32_bits
    return Settings(
        learning_rate_scale=learning_rate_scale(optimizer, optimizer.group_of(name)),
        weight_decay=weight_decay(optimizer, optimizer.group_of(name)) if is_decayed(name, parameter) else 0.0,
        keeps_32_bits=optimizer.kind == "adamw_8bit" and keeps_32_bits,
        is_sharded=has_8_bits and bool(getattr(parameter, "tensor_model_parallel", False)),
    )


def learning_rate_scale(optimizer: OptimizerConfig, group: int | None) -> float:
    """Return the factor on the learning rate in group number `group` (None: what no group matches)."""
    return 1.0 if group is None else optimizer.groups[group].learning_rate_scale


def weight_decay(optimizer: OptimizerConfig, group: int | None) -> float:
    """Return the weight decay of the matrices in group number `group` (None: what no group matches)."""
    own = None if group is None else optimizer.groups[group].weight_decay
    return optimizer.weight_decay if own is None else own


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter called `name`."""
    return parameter.dim() > 1 and not any(part in _UNDECAYED_NAMES for part in name.split("."))


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerConfig
) -> dict[Settings, list[nn.Parameter]]:
    """Return the trainable ones of `named` (global name, parameter) by their settings, in their order."""
    groups: dict[Settings, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(settings_of(name, parameter, optimizer), []).append(parameter)
    return groups


def share_settings(groups: dict[Settings, list[nn.Parameter]], group: dist.ProcessGroup) -> None:
    """Give every rank of `group` (the pipeline stages) all settings of any of them, in one order.

    DeepSpeed reduces norms group by group: ranks with other groups would hang, or add up what doesn't belong together.
    """
    settings: list[list[Settings]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(settings, list(groups), group=group)
    here = dict(groups)
    groups.clear()
    groups.update({one: here.get(one, []) for one in dict.fromkeys(chain(*settings))})


def add_placeholders(
    groups: dict[Settings, list[nn.Parameter]], counts: Iterable[nn.Parameter], example: nn.Parameter
) -> list[nn.Parameter]:
    """Add a zero, trained on gradients of zero, to each group without a parameter in `counts`; return the zeros.

    A pipeline stage may train nothing, or nothing of a group. AdamW and DeepSpeed refuse empty groups, and DeepSpeed's
    norms fail where none of a rank's parameters counts. Like `example` in dtype and device. Tensor ranks must add
    alike, or ZeRO would cut what they hold alike at other places on each.
    """
    counted, placeholders = set(counts), []
    for parameters in groups.values():
        if not counted.intersection(parameters):
            placeholder = nn.Parameter(torch.zeros(1, dtype=example.dtype, device=example.device))
            # Counted in norms on every tensor rank, where it adds nothing.
            placeholder.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameters.append(placeholder)
            placeholders.append(placeholder)
    return placeholders


def torch_groups(groups: dict[Settings, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """Return what torch optimizers take: `params`, `weight_decay`, `learning_rate_scale` and `keeps_32_bits`."""
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay,
            LEARNING_RATE_SCALE: settings.learning_rate_scale,
            KEEPS_32_BITS: settings.keeps_32_bits,
        }
        for settings, parameters in groups.items()
    ]
