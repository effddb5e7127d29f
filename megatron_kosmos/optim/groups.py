"""Parameter groups: with which settings each weight is trained, and which weights are not trained at all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_kosmos.config import OptimizerConfig

LEARNING_RATE_SCALE = "learning_rate_scale"
"""Key of a torch group: the factor on the schedule's learning rate."""

KEEPS_32_BITS = "keeps_32_bits"
"""Key of a torch group: whether its moments stay in fp32 where `optimizer.kind` keeps others in 8 bits."""

_UNDECAYED_NAMES = ("position_embedding", "position_embeddings", "class_embedding", "latents", "frame_embedding")
_EMBEDDING = "embedding."


@dataclass(frozen=True)
class Settings:
    """How a weight is trained. Weights with equal settings form one torch group."""

    group: int | None
    """Number in `optimizer.groups`, None where none matches."""
    learning_rate_scale: float
    weight_decay: float
    keeps_32_bits: bool
    """Whether its moments stay in fp32 beside 8-bit ones."""


def settings_of(name: str, parameter: nn.Parameter, optimizer: OptimizerConfig) -> Settings:
    """Return how the parameter called `name` is trained, if it is.

    Matrices decay; biases, norms, latents and embeddings of positions don't, whatever their group.
    """
    number = optimizer.group_of(name)
    scale, decay = 1.0, optimizer.weight_decay
    if number is not None:
        group = optimizer.groups[number]
        scale = group.learning_rate_scale
        decay = decay if group.weight_decay is None else group.weight_decay
    return Settings(
        group=number,
        learning_rate_scale=scale,
        weight_decay=decay if is_decayed(name, parameter) else 0.0,
        keeps_32_bits=optimizer.kind == "adamw_8bit" and name.startswith(_EMBEDDING),
    )


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Return torch's groups over the trainable ones of `named` (global name, parameter).

    Groups come in the order of their first parameter and keep that of `named`, so ranks that hold the same weights
    have the same groups. `params`, `weight_decay` and `learning_rate_scale` are set, and `keeps_32_bits`.
    """
    groups: dict[Settings, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(settings_of(name, parameter, optimizer), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay,
            LEARNING_RATE_SCALE: settings.learning_rate_scale,
            KEEPS_32_BITS: settings.keeps_32_bits,
        }
        for settings, parameters in groups.items()
    ]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter called `name`."""
    return parameter.dim() > 1 and not any(part in _UNDECAYED_NAMES for part in name.split("."))
