"""A microbatch's images on the tensor-parallel ranks of stage 0: equal shares, and bringing the embeddings together.

Shape letters: I images, J of them this rank's share, S image side, L latents, D decoder width.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_kosmos.batch import images_a_rank


def fill_up(images: Tensor, num_images: int, tp_group: dist.ProcessGroup) -> Tensor:
    """Return this rank's share `images` [J, 3, S, S] of `num_images` filled up with blank ones: [max(1, I / tp), …].

    Every microbatch then runs the same operations on every rank, whatever it holds (a rank that skipped the vision side
    would abort or hang ZeRO 2 and 3). Which images are a rank's: `batch.share_of_images`.
    """
    num_blank = images_a_rank(num_images, dist.get_world_size(tp_group)) - images.shape[0]
    return torch.cat([images, images.new_zeros(num_blank, *images.shape[1:])])


def gather_image_embeddings(embeddings: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Gather [I / tp, L, D] from every rank of `tp_group` into [I, L, D] on all of them.

    Backward: each rank keeps its own images' part of the gradient, which is the same on all ranks; nothing is summed
    here, so the vision side's parameter gradients are sums over local images until the gradients are finalized.
    """
    if dist.get_world_size(tp_group) == 1:
        return embeddings
    return gather_from_sequence_parallel_region(embeddings, tensor_parallel_output_grad=False, group=tp_group)
