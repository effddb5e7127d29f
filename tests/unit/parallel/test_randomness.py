"""Random streams follow from where and when they are drawn from, and from nothing else."""

from itertools import product

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_kosmos.parallel.cpu_backend import install_cpu_backend
from megatron_kosmos.parallel.randomness import derive_seed, seed_microbatch
from megatron_kosmos.parallel.topology import Topology


@pytest.fixture(autouse=True)
def megatron_on_cpu() -> None:
    install_cpu_backend()


def draw(
    seed: int = 1, step: int = 0, microbatch: int = 0, chunk: int = 0, dp_rank: int = 0, tp_rank: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what the default and the sharded stream give at one place."""
    place = Topology(tp_rank, 2, chunk % 2, 2, dp_rank, 2, virtual_size=1, device=torch.device("cpu"))
    seed_microbatch(seed, step, microbatch, chunk, place)
    default = tuple(torch.rand(4).tolist())
    with get_cuda_rng_tracker().fork():
        return default, tuple(torch.rand(4).tolist())


def test_every_place_draws_something_else() -> None:
    places = list(product((1, 2), (0, 1), (0, 1), (0, 1), (0, 1)))
    drawn = [stream for place in places for stream in draw(*place)]
    assert len(set(drawn)) == 2 * len(places)


def test_tensor_ranks_share_the_default_stream_only() -> None:
    (default, sharded), (other_default, other_sharded) = draw(tp_rank=0), draw(tp_rank=1)
    assert default == other_default
    assert sharded != other_sharded


def test_what_was_drawn_before_does_not_matter() -> None:
    first = draw(step=3)
    torch.rand(7)
    draw(step=4)
    assert draw(step=3) == first


def test_derived_seeds_depend_on_every_part_and_its_place() -> None:
    seeds = [derive_seed(*parts) for parts in [(1,), (1, 2), (2, 1), (12,), (1, 2, 0), (1, 2, "tp")]]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
