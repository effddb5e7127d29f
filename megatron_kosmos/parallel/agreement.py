"""Failing together: a rank that cannot go on takes all others with it, rather than leave them waiting for it."""

import torch
import torch.distributed as dist


def shared_failure(message: str | None, device: torch.device) -> str | None:
    """Return on every rank what the lowest rank that has a `message` says, and which it is; None where none has one.

    One all-reduce of a number over all ranks, and two more when there is a message. No rank leaves before all have it.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    speaker = torch.tensor(num_ranks if message is None else rank, device=device)
    dist.all_reduce(speaker, op=dist.ReduceOp.MIN)
    if int(speaker) == num_ranks:
        return None
    text = f"rank {rank}: {message}".encode(errors="backslashreplace") if int(speaker) == rank else b""
    length = torch.tensor(len(text), device=device)
    dist.all_reduce(length)
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if text:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.all_reduce(content)
    return content.cpu().numpy().tobytes().decode()
