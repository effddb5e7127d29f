"""What a tensor's part must be, and where it lies in the whole."""

import pytest
import torch

from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.tensors import TensorShard


def test_a_part_knows_the_whole() -> None:
    """With one tensor-parallel rank; tests/distributed has more."""
    mesh = CheckpointMesh()
    columns = TensorShard("w", torch.zeros(3, 5), shard_dim=1)
    assert columns.global_shape(mesh) == (3, 5)
    assert columns.chunk(mesh).offsets == (0, 0)
    scalar = TensorShard("step", torch.tensor(3), shard_dim=None)
    assert scalar.global_shape(mesh) == ()


def test_a_part_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w: the local tensor \[3, 2\] is not contiguous"):
        TensorShard("w", torch.zeros(2, 3).T, shard_dim=0)
    with pytest.raises(ValueError, match=r"w: shard_dim=1 is no dim of \[4\]"):
        TensorShard("w", torch.zeros(4), shard_dim=1)
