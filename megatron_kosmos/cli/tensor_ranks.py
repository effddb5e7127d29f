"""A command on the processes that torchrun started: all of them do the same, and the first one speaks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ranks:
    """The processes of a command."""

    rank: int
    """This one's number."""
    size: int
    """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether what this process writes is read by anyone."""
        return self.rank == 0


@contextmanager
def tensor_ranks(command: str) -> Iterator[Ranks]:
    """Join the processes of torchrun, if it started this one; leave the process group at the end, whoever began it.

    Of several processes the first alone prints, and an error of any that a user can mend ends all of them with one
    message. A process that is alone raises its errors.
    """
    ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if ranks.size == 1:
        try:
            yield ranks
        finally:
            _leave()
        return
    from megatron_kosmos.engine.parallel_generation import EndedTogether, ending_together
    from megatron_kosmos.parallel.topology import start_process_group, stop_process_group

    device = start_process_group(ranks.rank, ranks.size, int(os.environ["LOCAL_RANK"]))
    try:
        with _silent_unless(ranks.is_first), ending_together(device):
            yield ranks
    except EndedTogether as error:
        if ranks.is_first:
            print(f"kosmos {command}: {error}", file=sys.stderr, flush=True)
        # The launcher ends the rest as soon as one process is gone: not before that is said.
        stop_process_group(wait_for_all=True)
        sys.exit(1)
    stop_process_group(wait_for_all=True)


@contextmanager
def _silent_unless(is_heard: bool) -> Iterator[None]:
    if is_heard:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        from megatron_kosmos.parallel.topology import stop_process_group

        stop_process_group()
