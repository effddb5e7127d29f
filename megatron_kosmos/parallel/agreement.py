"""Agreeing on what one rank alone knows: that it cannot go on, or that it was asked to stop.

A rank that left on its own would leave all others waiting for it.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist


class Agreement(NamedTuple):
    """What all ranks now know."""

    failure: str | None
    """What the lowest rank that failed says, and which it is; None where none failed."""
    stopped_rank: int | None
    """The lowest rank that was asked to stop."""


def agree(failure: str | None, is_asked_to_stop: bool, device: torch.device) -> Agreement:
    """Tell all ranks of a `failure` of this one, and whether it was asked to stop; return the same on every rank.

    One all-reduce of two numbers over all ranks, and two more when there is a failure. No rank leaves before all have
    it.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    lowest = torch.tensor([num_ranks if failure is None else rank, rank if is_asked_to_stop else num_ranks])
    lowest = lowest.to(device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    speaker, stopped = lowest.tolist()
    return Agreement(
        None if speaker == num_ranks else _message_of(speaker, f"rank {rank}: {failure}", device),
        None if stopped == num_ranks else stopped,
    )


def number_of_rank_0(number: int, device: torch.device) -> int:
    """Return rank 0's `number` on every rank. Broadcast over all ranks."""
    shared = torch.tensor(number, device=device)
    dist.broadcast(shared, 0)
    return int(shared)


def _message_of(speaker: int, message: str, device: torch.device) -> str:
    """Return the `message` of one rank on every rank."""
    text = message.encode(errors="backslashreplace") if dist.get_rank() == speaker else b""
    length = torch.tensor(len(text), device=device)
    dist.all_reduce(length)
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if text:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.all_reduce(content)
    return content.cpu().numpy().tobytes().decode()


def is_shared(content: bytes, device: torch.device) -> bool:
    """Return on every rank whether all ranks have the same `content`. One all-reduce of two numbers over all ranks."""
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, negated_lowest = extremes.tolist()
    return bool(highest == -negated_lowest)
