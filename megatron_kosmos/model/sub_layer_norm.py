"""Magneto's sub-LN inside a row-parallel projection: a LayerNorm over a width that tensor parallelism has cut.

Shape letters: T tokens, B batch, W this rank's share of the normalized width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class SubLNRowParallelLinear(RowParallelLinear):
    """`y = A LayerNorm(x) + b` with x [T, B, W] cut along its width (arXiv 2210.06423, section 2.2).

    The bias is added here, not by the caller: a parameter used outside its module's forward would be gone
    under ZeRO 3.
    """

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        kwargs["skip_bias_add"] = False
        super().__init__(input_size, output_size, **kwargs)
        self.norm = ShardedLayerNorm(
            input_size, self.tp_group, self.config.layernorm_epsilon, dtype=self.config.params_dtype
        )

    def forward(self, x_TBW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the projection [T, B, D] (its sequence shard under sequence parallelism) and None for the bias."""
        return super().forward(self.norm(x_TBW))


class ShardedLayerNorm(nn.Module):
    """LayerNorm over the full width of an activation of which each rank of `group` holds W columns.

    Statistics are those of the full width, in fp32 (fp64 for fp64 inputs), so the result is that of one process.
    """

    def __init__(self, width: int, group: dist.ProcessGroup, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.group, self.epsilon = group, epsilon
        share = width // dist.get_world_size(group)
        self.weight = nn.Parameter(torch.ones(share, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(share, dtype=dtype))
        for parameter in (self.weight, self.bias):
            # DeepSpeed's norm would otherwise count one shard only; initialization and checkpoints cut by them.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 0  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x_TBW: Tensor) -> Tensor:
        """Normalize [T, B, W]. One small collective over `group` forward and one backward."""
        if dist.get_world_size(self.group) == 1:
            return F.layer_norm(x_TBW, self.weight.shape, self.weight, self.bias, self.epsilon)
        normalized: Tensor = _NormalizeOverGroup.apply(x_TBW, self.group, self.epsilon)
        return normalized.to(x_TBW.dtype) * self.weight + self.bias


class _NormalizeOverGroup(torch.autograd.Function):
    """(x - mean) / std over the columns of all ranks of a group.

    Forward: all-gather of each rank's mean and sum of squared deviations, merged exactly (Chan et al. 1979), since
    E[x²] - mean² cancels. Backward: all-reduce of the two sums that the LayerNorm gradient needs.
    """

    @staticmethod
    def forward(ctx: Any, x_TBW: Tensor, group: dist.ProcessGroup, epsilon: float) -> Tensor:
        x = x_TBW.to(torch.promote_types(x_TBW.dtype, torch.float32))
        variance, mean = torch.var_mean(x, dim=-1, correction=0)
        shares = [torch.empty_like(torch.stack((mean, variance))) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shares, torch.stack((mean, variance)), group=group)
        means, variances = torch.stack(shares, dim=1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        inverse_std = torch.rsqrt(variance + epsilon).unsqueeze(-1)
        normalized = (x - mean.unsqueeze(-1)) * inverse_std
        ctx.save_for_backward(normalized, inverse_std)
        ctx.group, ctx.input_dtype = group, x_TBW.dtype
        return normalized

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normalized, inverse_std = ctx.saved_tensors  # type: ignore[attr-defined]
        group = ctx.group  # type: ignore[attr-defined]
        gradient = gradients[0].to(normalized.dtype)
        sums = torch.stack((gradient.sum(-1), (gradient * normalized).sum(-1)))
        dist.all_reduce(sums, group=group)
        means = sums.unsqueeze(-1) / (normalized.shape[-1] * dist.get_world_size(group))
        result = (gradient - means[0] - normalized * means[1]) * inverse_std
        return result.to(ctx.input_dtype), None, None  # type: ignore[attr-defined]
