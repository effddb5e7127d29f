"""What must happen to gradients between the schedule's last backward pass and the optimizer step.

Five classes of parameters have gradients that are not whole where the schedule leaves them:

1. under sequence parallelism, replicated ones that saw a rank's share of the tokens: sum over the tensor ranks;
2. tied embeddings, whose two copies stand on the first and the last stage: sum over the two;
3. the vision side, of which each tensor rank saw its share of the images: sum over the tensor ranks;
4. the norms of queries and keys, of which each tensor rank saw its share of the heads: sum over the tensor ranks;
5. the sub-LN's weights, cut like the width they normalize: nothing to sum, but marked so that norms count every shard.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_kosmos.parallel.topology import Topology

GradientOf = Callable[[nn.Parameter], Tensor | None]

_MARKS_OF_PARTS = ("sequence_parallel", "sees_image_shard", "sees_head_shard")
"""What the model sets on parameters; one that bears several is still summed once."""


def needs_tensor_parallel_sum(parameter: nn.Parameter) -> bool:
    """Whether each tensor rank holds a part of the sum that is this parameter's gradient (classes 1, 3 and 4)."""
    return any(getattr(parameter, mark, False) for mark in _MARKS_OF_PARTS)


def finalize_gradients(parameters: Iterable[nn.Parameter], gradient_of: GradientOf, topology: Topology) -> None:
    """Sum the gradients of classes 1, 3 and 4, in place. All-reduce over the tensor group."""
    if topology.tp_size == 1:
        return
    gradients = [
        gradient
        for parameter in parameters
        if needs_tensor_parallel_sum(parameter) and (gradient := gradient_of(parameter)) is not None
    ]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        dist.all_reduce(flat, group=topology.tp_group)
        for gradient, part in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(part.view_as(gradient))


def sum_tied_embedding(weight: nn.Parameter | None, gradient_of: GradientOf, group: dist.ProcessGroup | None) -> None:
    """Add up the gradients of the tied embedding's two copies over `group`, megatron-core's embedding group.

    `weight` is this rank's copy, None on stages that hold none; only the first and the last stage take part.
    """
    if weight is None or group is None or dist.get_world_size(group) == 1:
        return
    gradient = gradient_of(weight)
    assert gradient is not None, "a tied embedding always has a gradient: both ends of the pipeline use it"
    dist.all_reduce(gradient, group=group)


def sum_gradients_while_they_arise(parameters: Iterable[nn.Parameter], topology: Topology) -> None:
    """Register hooks that sum each gradient over the tensor ranks as it is computed.

    For ZeRO 2 and 3, which cut and free gradients during the backward pass: afterwards is too late.
    """
    if topology.tp_size == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        whole = gradient.clone()
        dist.all_reduce(whole, group=topology.tp_group)
        return whole

    for parameter in parameters:
        if parameter.requires_grad and needs_tensor_parallel_sum(parameter):
            parameter.register_hook(summed)
