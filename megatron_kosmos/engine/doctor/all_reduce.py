"""The collectives of training tried on one rank: is every sum right, how fast is it, which rank holds the others up.

Letters: R ranks, N elements.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.engine.doctor.facts import SumFacts

_PERIOD = 61
"""Of the numbers that are summed: small whole ones, so that fp32 sums of thousands of ranks are exact."""
_GATHERED = 1024
"""Elements of each rank that all others look at."""
_KIB, _MIB = 2**10, 2**20


@dataclass(frozen=True)
class Trial:
    """What is tried, and how large."""

    sum_bytes: tuple[int, ...]
    """Of the all-reduces."""
    link_bytes: int
    matrix_width: int
    """Of the product that every rank computes by itself."""
    num_products: int
    repeats: int = 5


ON_CPU = Trial(sum_bytes=(4 * _KIB, _MIB), link_bytes=_MIB, matrix_width=256, num_products=4, repeats=3)
ON_GPU = Trial(sum_bytes=(64 * _KIB, 4 * _MIB, 256 * _MIB), link_bytes=64 * _MIB, matrix_width=8192, num_products=8)


def contribution(rank: int, num_elements: int, device: torch.device) -> Tensor:
    """Return what `rank` sends, fp32 [N]."""
    return torch.arange(num_elements, device=device).remainder(_PERIOD).float() + (rank + 1)


def expected_sum(world_size: int, num_elements: int, device: torch.device) -> Tensor:
    """Return the sum of all ranks' contributions, fp32 [N]."""
    ramp = torch.arange(num_elements, device=device).remainder(_PERIOD).float()
    return ramp * world_size + world_size * (world_size + 1) // 2


def try_collectives(
    trial: Trial,
    device: torch.device,
    neighbour_distance: int,
    say: Callable[[str], None],
    contribute: Callable[[int, int, torch.device], Tensor] = contribution,
) -> SumFacts:
    """Sum, gather and pass on, over all ranks of the default process group, which takes part alike.

    `neighbour_distance` is how many ranks further on a rank sends to: a node's number of ranks takes the way between
    nodes. `say` hears what comes next. `contribute` is another function only where a rank is to be wrong on purpose.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    say("multiplying matrices")
    work_seconds = _time_work(trial, device)
    seconds, wrong_sums = [], 0
    for num_bytes in trial.sum_bytes:
        say(f"summing {num_bytes:,} bytes")
        mine = contribute(rank, num_bytes // 4, device)
        total = mine.clone()
        dist.all_reduce(total)
        wrong_sums += not torch.equal(total, expected_sum(world_size, num_bytes // 4, device))
        seconds.append(statistics.median(_time_repeats(trial, device, partial(dist.all_reduce, mine))))
    say("gathering what each rank sends")
    gathered = [torch.empty(_GATHERED, device=device) for _ in range(world_size)]
    dist.all_gather(gathered, contribute(rank, _GATHERED, device))
    wrong = [
        sender
        for sender, received in enumerate(gathered)
        if not torch.equal(received, contribution(sender, _GATHERED, device))
    ]
    say("passing on to a neighbour")
    link_seconds = _time_link(trial, device, neighbour_distance) if world_size > 1 else 0.0
    return SumFacts(
        num_bytes=trial.sum_bytes,
        seconds=tuple(seconds),
        wrong_sums=wrong_sums,
        wrong_senders=tuple(wrong),
        work_seconds=work_seconds,
        link_seconds=link_seconds,
        link_bytes=trial.link_bytes,
        sender=(rank - neighbour_distance) % world_size,
    )


def _time_work(trial: Trial, device: torch.device) -> float:
    """Return the time that this rank needs by itself for the same products as every rank."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.full((trial.matrix_width, trial.matrix_width), 1 / trial.matrix_width, dtype=dtype, device=device)

    def multiply() -> None:
        product = matrix
        for _ in range(trial.num_products):
            product = product @ matrix

    return min(_time_repeats(trial, device, multiply))


def _time_link(trial: Trial, device: torch.device, distance: int) -> float:
    """Return the time to receive from the rank `distance` before this one, while all ranks pass on alike."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent = torch.zeros(trial.link_bytes // 4, device=device)
    received = torch.empty_like(sent)

    def pass_on() -> None:
        ways = [
            dist.P2POp(dist.isend, sent, (rank + distance) % world_size),
            dist.P2POp(dist.irecv, received, (rank - distance) % world_size),
        ]
        for work in dist.batch_isend_irecv(ways):
            work.wait()

    return min(_time_repeats(trial, device, pass_on))


def _time_repeats(trial: Trial, device: torch.device, function: Callable[[], object]) -> list[float]:
    """Return seconds of each repeat, after one that isn't counted."""
    seconds = []
    for _ in range(trial.repeats + 1):
        _finish(device)
        start = time.perf_counter()
        function()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
