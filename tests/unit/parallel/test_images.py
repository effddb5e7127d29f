"""A microbatch's images over the tensor ranks: shared out with blanks to fill up, gathered, gradients split."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.batch import share_of_images
from megatron_kosmos.config import ParallelConfig
from megatron_kosmos.parallel.images import fill_up, gather_image_embeddings
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

SIDE, LATENTS, WIDTH = 2, 3, 4
COUNTS = (0, 1, 4, 5)


def some_images(num_images: int) -> Tensor:
    return torch.arange(1.0, 1 + num_images).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE).contiguous()


def share_and_gather_all(tp_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    group = build_topology(ParallelConfig(tensor_parallel_size=tp_size), torch.device("cpu")).tp_group
    return [share_and_gather(num_images, group) for num_images in COUNTS]


def share_and_gather(num_images: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's images, the gathered embeddings, and the gradient of its own embeddings."""
    mine = share_of_images(num_images, dist.get_rank(group), dist.get_world_size(group))
    share = fill_up(some_images(num_images)[mine], num_images, group)
    embeddings = share.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, LATENTS, WIDTH).clone().requires_grad_()
    gathered = gather_image_embeddings(embeddings, group)
    # What comes after is computed alike on every tensor rank, so it gives each the same gradient.
    weight = torch.arange(float(gathered.shape[0])).view(-1, 1, 1)
    (gathered * weight).sum().backward()
    assert embeddings.grad is not None
    return share, gathered.detach(), embeddings.grad


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_images_are_shared_out_and_come_together(tp_size: int) -> None:
    ranks = run_ranks(share_and_gather_all, tp_size, tp_size)
    for number, num_images in enumerate(COUNTS):
        share = max(1, -(-num_images // tp_size))
        expected = torch.cat((some_images(num_images), torch.zeros(share * tp_size - num_images, 3, SIDE, SIDE)))
        for rank, results in enumerate(ranks):
            images, gathered, gradient = results[number]
            own = slice(rank * share, (rank + 1) * share)
            assert torch.equal(images, expected[own])
            assert torch.equal(gathered[:, 0, 0], expected[:, 0, 0, 0])
            # Its own images' part of the gradient: not summed over the ranks, which would count it tp_size times.
            assert torch.equal(gradient[:, 0, 0], torch.arange(float(share * tp_size))[own])
