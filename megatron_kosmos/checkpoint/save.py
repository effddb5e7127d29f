"""Writing a checkpoint: all ranks into a temporary folder, which gets its name once everything is on the disk."""

import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.folders import (
    complete_folder,
    finished_steps,
    leftovers,
    set_aside,
    sync_folder,
    write_durably,
    writing_folder,
)
from megatron_kosmos.checkpoint.manifest import STATE_FILE, FileRecord, Manifest, TensorRecord
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.tensors import JSON, SaveShards, TensorShard, by_name

logger = logging.getLogger(__name__)


def save_checkpoint(
    root: Path,
    step: int,
    shards: Sequence[TensorShard],
    state: Mapping[str, JSON],
    mesh: CheckpointMesh,
    keep_last: int,
) -> Path:
    """Write the checkpoint of a step and return its folder, `root/step_XXXXXXXX` (a collective over `mesh.group`).

    Each rank passes the parts that it holds; a part held by several is written by one of them, in even shares. `state`
    counts on rank 0. A checkpoint of the same step is replaced. Of those up to this step the `keep_last` newest stay.

    Raises CheckpointError, the same on every rank, if anything fails anywhere (a full disk, parts that don't make a
    whole tensor, a state that is not JSON); the checkpoints that were there before are then untouched.
    """
    folder, target = writing_folder(root, step), complete_folder(root, step)
    doing = f"saving {target}"
    is_first = mesh.rank == 0
    try:
        (state_text, *_) = mesh.agree(doing, lambda: _prepare(folder, state) if is_first else "")
        named = by_name(shards, doing, mesh)
        writer = _Writer(folder)
        metadata = mesh.together(doing, lambda: _write_tensors(writer, SaveShards(named, mesh), named, mesh))
        records = mesh.agree(doing, lambda: {name: FileRecord.of(folder / name) for name in writer.written})
        manifest = _manifest(step, records, metadata)
        mesh.agree(doing, lambda: _commit(folder, target, state_text, manifest) if is_first else None)
    except CheckpointError:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    mesh.agree(f"removing checkpoints older than {target}", lambda: _prune(root, step, keep_last) if is_first else None)
    return target


class _Writer(HuggingFaceStorageWriter):
    """torch's writer of one plain safetensors file a rank, which also knows what this rank has written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.written: set[str] = set()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner)
        self.written = {result.storage_data.relative_path for result in results.wait()}
        return results


def _prepare(folder: Path, state: Mapping[str, JSON]) -> str:
    text = json.dumps(state, indent=1, allow_nan=False)
    for leftover in leftovers(folder.parent):
        logger.warning("removing %s, left by a save that was killed", leftover)
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    return text


def _write_tensors(
    writer: _Writer, planner: SaveShards, named: Mapping[str, TensorShard], mesh: CheckpointMesh
) -> Metadata:
    tensors = {name: shard.local for name, shard in named.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # One process alone is meant to be alone.
        return dcp.save(
            tensors, storage_writer=writer, planner=planner, process_group=mesh.group, no_dist=mesh.group is None
        )


def _manifest(step: int, records: Sequence[Mapping[str, FileRecord]], metadata: Metadata) -> Manifest:
    tensors = {
        name: TensorRecord(shape=tuple(stored.size), dtype=str(stored.properties.dtype).removeprefix("torch."))
        for name, stored in sorted(metadata.state_dict_metadata.items())
        if isinstance(stored, TensorStorageMetadata)
    }
    return Manifest(step=step, files={name: of_rank[name] for of_rank in records for name in of_rank}, tensors=tensors)


def _commit(folder: Path, target: Path, state_text: str, manifest: Manifest) -> None:
    for name in manifest.files:
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} was written by another rank but is not here: share the run folder")
    write_durably(folder / STATE_FILE, state_text)
    files = {**manifest.files, STATE_FILE: FileRecord.of(folder / STATE_FILE)}
    manifest.model_copy(update={"files": files}).write(folder)
    sync_folder(folder)
    replaced = set_aside(target) if target.exists() else None
    folder.rename(target)
    sync_folder(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _prune(root: Path, step: int, keep_last: int) -> None:
    # Newer folders are another history's, or damaged: whoever resumed before them may still want to look at them.
    for old in [done for done in finished_steps(root) if done <= step][keep_last:]:
        shutil.rmtree(set_aside(complete_folder(root, old)))
