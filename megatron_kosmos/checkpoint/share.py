"""Which parts of a checkpoint's tensors a rank writes: planned once for a layout, the same at every save."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.manifest import TensorRecord
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.tensors import SaveShards, TensorShard, by_name


@dataclass(frozen=True)
class Share:
    """What one rank writes, into one file, and what all of them write together."""

    file_name: str
    parts: Mapping[str, TensorShard]
    """The parts that this rank writes, by name. A part that several ranks hold is in the share of one of them."""
    offsets: Mapping[str, Sequence[int]]
    """Where each part begins in its whole tensor."""
    tensors: Mapping[str, TensorRecord]
    """Every whole tensor of the checkpoint, by name."""

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's parts."""
        return sum(part.local.nbytes for part in self.parts.values())


def plan_shares(shards: Sequence[TensorShard], doing: str, mesh: CheckpointMesh) -> Share:
    """Return this rank's share of what all ranks hold, evenly by bytes (a collective over `mesh.group`).

    Only shapes and dtypes count, so `shards` may be on the meta device. Raises CheckpointError, the same on every rank,
    if two shards of a rank have one name or the parts make no whole tensor.
    """
    named = by_name(shards, doing, mesh)
    planner = SaveShards(named, mesh)
    plans = mesh.agree(doing, planner.create_local_plan)
    try:  # Every rank plans for all, from the same plans: they fail alike.
        shares, metadata = planner.create_global_plan(plans)
    except ValueError as error:
        raise CheckpointError(f"{doing} failed on every rank: {error}") from error
    return _share(shares[mesh.rank], metadata, named, mesh)


def _share(plan: SavePlan, metadata: Metadata, named: Mapping[str, TensorShard], mesh: CheckpointMesh) -> Share:
    names = [item.index.fqn for item in plan.items]
    tensors = {
        name: TensorRecord(shape=tuple(stored.size), dtype=str(stored.properties.dtype).removeprefix("torch."))
        for name, stored in sorted(metadata.state_dict_metadata.items())
        if isinstance(stored, TensorStorageMetadata)
    }
    return Share(
        file_name=f"shard-{mesh.rank + 1:05d}-of-{mesh.size:05d}.safetensors",
        parts={name: named[name] for name in names},
        offsets={name: list(named[name].chunk(mesh).offsets) for name in names},
        tensors=tensors,
    )
