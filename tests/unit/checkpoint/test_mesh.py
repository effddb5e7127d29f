"""How ranks agree, as far as one process can show it (tests/distributed has the rest)."""

import pytest

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.mesh import CheckpointMesh, raise_failures


@pytest.mark.parametrize("tp_rank, tp_size", [(0, 2), (1, 1), (-1, 1)])
def test_parts_that_no_rank_could_hold_are_refused(tp_rank: int, tp_size: int) -> None:
    with pytest.raises(ValueError, match=f"tp_rank={tp_rank} of tp_size={tp_size} does not fit 1 ranks"):
        CheckpointMesh(tp_rank, tp_size)


def test_a_failure_names_the_work_and_the_error() -> None:
    assert CheckpointMesh().agree("counting", lambda: 3) == [3]
    with pytest.raises(CheckpointError, match=r"^dividing failed on rank 0: ZeroDivisionError: .*zero"):
        CheckpointMesh().agree("dividing", lambda: 1 // 0)


def test_ranks_with_the_same_failure_are_listed_together() -> None:
    with pytest.raises(CheckpointError, match=r"^saving failed on rank 1, 3: no room; rank 2: no file$"):
        raise_failures("saving", {3: "no room", 2: "no file", 1: "no room"})
    raise_failures("saving", {})
