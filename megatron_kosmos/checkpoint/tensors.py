"""A rank's part of a named tensor, and the planners that tell torch.distributed.checkpoint where it lies.

torch's planners read a tensor's place from a DTensor. These read it from `TensorShard`, so that no device mesh has to
exist and tensors of one checkpoint may live on different devices.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_kosmos.checkpoint.mesh import CheckpointMesh

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

SHARDING = "DCP_SHARDING_INFO"
"""Under this name a file says what torch.distributed.checkpoint reads: each part's place in its whole tensor."""


@dataclass(frozen=True)
class TensorShard:
    """One rank's part of a tensor that has a name independent of the layout. Raises ValueError if it cannot be one."""

    name: str
    """Global, such as "decoder.layers.3.mlp.linear_fc1.weight"."""
    local: Tensor
    """This rank's part, contiguous, on any device. Loading fills it in place."""
    shard_dim: int | None
    """The dim that tensor parallelism cuts into equal parts; None when every tensor-parallel rank holds the same."""

    def __post_init__(self) -> None:
        if not self.local.is_contiguous():
            raise ValueError(f"{self.name}: the local tensor {list(self.local.shape)} is not contiguous")
        if self.shard_dim is not None and not 0 <= self.shard_dim < self.local.dim():
            raise ValueError(f"{self.name}: shard_dim={self.shard_dim} is no dim of {list(self.local.shape)}")

    def global_shape(self, mesh: CheckpointMesh) -> torch.Size:
        """Return the shape of the whole tensor."""
        parts = mesh.tp_size
        return torch.Size(size * parts if dim == self.shard_dim else size for dim, size in enumerate(self.local.shape))

    def chunk(self, mesh: CheckpointMesh) -> ChunkStorageMetadata:
        """Return where the part lies in the whole tensor."""
        shape = self.local.shape
        offsets = (mesh.tp_rank * size if dim == self.shard_dim else 0 for dim, size in enumerate(shape))
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=shape)


def by_name(shards: Sequence[TensorShard], doing: str, mesh: CheckpointMesh) -> dict[str, TensorShard]:
    """Return the shards under their names (a collective). Raises CheckpointError if two of one rank have the same."""
    named = {shard.name: shard for shard in shards}
    mesh.agree(doing, lambda: _check_distinct([shard.name for shard in shards]))
    return named


def _check_distinct(names: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"several tensors of one rank are named {', '.join(twice)}")


class SaveShards(DefaultSavePlanner):
    """Plans to write each part once, however many ranks hold it."""

    def __init__(self, shards: Mapping[str, TensorShard], mesh: CheckpointMesh) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._mesh = mesh

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._write_item(shard) for shard in self._shards.values()])
        return self.plan

    def _write_item(self, shard: TensorShard) -> WriteItem:
        chunk = shard.chunk(self._mesh)
        properties = TensorProperties.create_from_tensor(shard.local)
        return WriteItem(
            index=MetadataIndex(shard.name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, shard.global_shape(self._mesh)),
        )

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._shards[index.fqn].local


class LoadShards(DefaultLoadPlanner):
    """Plans to read the bytes that this rank's parts need, whatever the layout they were written under."""

    def __init__(self, shards: Mapping[str, TensorShard], mesh: CheckpointMesh) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._mesh = mesh

    def create_local_plan(self) -> LoadPlan:
        items = []
        for shard in self._shards.values():
            stored = self.metadata.state_dict_metadata[shard.name]  # type: ignore[union-attr] # there by now
            items += create_read_items_for_chunk_list(shard.name, stored, [shard.chunk(self._mesh)])  # type: ignore[arg-type]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._shards[index.fqn].local
