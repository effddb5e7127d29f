"""Parameter groups: what is decayed, what is not, and what is not trained at all."""

from collections.abc import Iterable
from typing import Any

from torch import nn

_UNDECAYED_NAMES = ("position_embedding", "position_embeddings", "class_embedding", "latents", "frame_embedding")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return torch optimizer groups over the trainable ones of `named` (global name, parameter), in their order.

    Matrices decay; biases, norms, latents and embeddings of positions don't.
    """
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[weight_decay if is_decayed(name, parameter) else 0.0].append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter called `name`."""
    return parameter.dim() > 1 and not any(part in _UNDECAYED_NAMES for part in name.split("."))
