"""The LayerNorm of the residual stream, by the kernel that the run has chosen."""

import torch
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from torch import nn

from megatron_kosmos.model.magneto_config import MagnetoConfig


class ResidualLayerNorm:
    """Makes a LayerNorm over the residual stream; a class, since megatron-core's specs take nothing else.

    Whatever computes it, its parameters are `weight` and `bias`, alike on all tensor ranks; under sequence parallelism
    their gradients are summed over them. The sub-LN, whose width is cut, is `sub_layer_norm.ShardedLayerNorm`.
    """

    def __new__(cls, config: MagnetoConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:  # type: ignore[misc]
        build = {"torch": _torch, "apex": _apex, "te": _transformer_engine}[config.kernels.layer_norm]
        norm = build(config, hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def _torch(config: MagnetoConfig, hidden_size: int, eps: float) -> nn.Module:
    return nn.LayerNorm(hidden_size, eps, dtype=config.params_dtype)


def _apex(config: MagnetoConfig, hidden_size: int, eps: float) -> nn.Module:
    """Return apex's; for the widths that its persistent kernel knows and was built for, that one."""
    norm: nn.Module = FusedLayerNorm(config, hidden_size, eps).to(config.params_dtype)
    return norm


def _transformer_engine(config: MagnetoConfig, hidden_size: int, eps: float) -> nn.Module:
    from transformer_engine.pytorch import LayerNorm

    # It is made on the GPU at once: releases before 2.2 know no other place.
    norm: nn.Module = LayerNorm(
        hidden_size, eps=eps, dtype=config.params_dtype, device=torch.device("cuda", torch.cuda.current_device())
    )
    return norm
