"""The ranks that save or load one checkpoint together, and how they succeed or fail as one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kosmos.checkpoint.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointMesh:
    """This rank's place among the ranks that share a checkpoint. The default is one process alone.

    Raises ValueError if the parts of a tensor-parallel tensor cannot all be in the group.
    """

    tp_rank: int = 0
    """Which part of a tensor-parallel tensor this rank holds."""
    tp_size: int = 1
    """Parts that a tensor-parallel tensor is cut into."""
    group: dist.ProcessGroup | None = None
    """Every rank of the run, on a backend for CPU tensors (gloo), since plans are exchanged as Python objects."""

    def __post_init__(self) -> None:
        if not 0 <= self.tp_rank < self.tp_size or self.size % self.tp_size:
            raise ValueError(f"tp_rank={self.tp_rank} of tp_size={self.tp_size} does not fit {self.size} ranks")

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, in rank order, on every rank (a collective over `group`)."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def agree(self, doing: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results, in rank order (a collective over `group`).

        Results travel as copies: keep them small, and let them hold no tensors.
        If it fails anywhere, every rank raises the same CheckpointError, so that none goes on alone and none waits for
        a rank that has left.
        """
        result: T | None = None
        failure: str | None = None
        try:
            result = work()
        except Exception as error:
            failure = describe(error)
        outcomes = self.gather((result, failure))
        raise_failures(doing, {rank: failed for rank, (_, failed) in enumerate(outcomes) if failed is not None})
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def together(self, doing: str, collective: Callable[[], T]) -> T:
        """Run a call of torch.distributed.checkpoint, which tells every rank of a failure itself; raise it as ours."""
        try:
            return collective()
        except CheckpointException as error:
            raise_failures(doing, {rank: describe(cause) for rank, (cause, _) in error.failures.items()})
            raise


def describe(error: BaseException) -> str:
    """Return an error as one line for a user: system errors speak for themselves, others with their kind."""
    return str(error) if isinstance(error, OSError | CheckpointError) else f"{type(error).__name__}: {error}"


def raise_failures(doing: str, failures: dict[int, str]) -> None:
    """Raise one CheckpointError that names each failure once with the ranks it befell; nothing if there is none."""
    if not failures:
        return
    ranks_by_failure: dict[str, list[str]] = {}
    for rank, failure in sorted(failures.items()):
        ranks_by_failure.setdefault(failure, []).append(str(rank))
    listed = "; ".join(f"rank {', '.join(ranks)}: {failure}" for failure, ranks in ranks_by_failure.items())
    raise CheckpointError(f"{doing} failed on {listed}")
