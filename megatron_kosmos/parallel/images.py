"""Splitting a microbatch's images over the tensor-parallel ranks of stage 0, and bringing the embeddings together.

Shape letters: I images, S image side, L latents, D decoder width.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def local_images(images: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return this rank's share [ceil(I / tp), 3, S, S] of `images` [I, 3, S, S], the same on all ranks of `tp_group`.

    The images are filled up with blank ones, at least one a rank: every microbatch then runs the same operations,
    whatever it holds (a rank that skipped the vision side would abort or hang ZeRO 2 and 3).
    """
    size, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    share = max(1, -(-images.shape[0] // size))
    blank = images.new_zeros(share * size - images.shape[0], *images.shape[1:])
    return torch.cat([images, blank])[rank * share : (rank + 1) * share]


def gather_image_embeddings(embeddings: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Gather [I / tp, L, D] from every rank of `tp_group` into [I, L, D] on all of them.

    Backward: each rank keeps its own images' part of the gradient, which is the same on all ranks; nothing is summed
    here, so the vision side's parameter gradients are sums over local images until the gradients are finalized.
    """
    if dist.get_world_size(tp_group) == 1:
        return embeddings
    return gather_from_sequence_parallel_region(embeddings, tensor_parallel_output_grad=False, group=tp_group)
