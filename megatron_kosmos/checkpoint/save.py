"""Writing a checkpoint: all ranks into a temporary folder, which gets its name once everything is on the disk."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.folders import (
    complete_folder,
    finished_steps,
    leftovers,
    point_to,
    set_aside,
    sync_folder,
    write_durably,
    writing_folder,
)
from megatron_kosmos.checkpoint.manifest import STATE_FILE, FileRecord, Manifest
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.part_file import write_part_file
from megatron_kosmos.checkpoint.share import Share, plan_shares
from megatron_kosmos.checkpoint.tensors import JSON, TensorShard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    last: int
    """That many of the newest."""
    every: int = 0
    """And those of every so many steps, for good; 0: none."""

    def outdated(self, steps: Sequence[int]) -> list[int]:
        """Return which of `steps`, newest first, go."""
        return [step for step in steps[self.last :] if not self.every or step % self.every]


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
    share = plan_shares(shards, f"saving {complete_folder(root, step)}", mesh)
    tensors = {name: part.local.cpu() for name, part in share.parts.items()}
    return CheckpointWriter(root, share, mesh, Retention(keep_last)).write(step, tensors, state)


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints of one layout. `mesh.group` is used by the thread that calls `write` alone."""

    root: Path
    share: Share
    mesh: CheckpointMesh
    retention: Retention

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON]) -> Path:
        """Write this rank's share, CPU `tensors` by name, and on rank 0 `state`; see `save_checkpoint`."""
        folder, target = writing_folder(self.root, step), complete_folder(self.root, step)
        doing, agree, is_first = f"saving {target}", self.mesh.agree, self.mesh.rank == 0
        try:
            (state_text, *_) = agree(doing, lambda: _prepare(folder, state) if is_first else "")
            records = agree(doing, lambda: _write_share(folder, self.share, tensors))
            files = {name: record for of_rank in records for name, record in of_rank.items()}
            manifest = Manifest(step=step, files=files, tensors=dict(self.share.tensors))
            agree(doing, lambda: _commit(folder, target, state_text, manifest) if is_first else None)
        except CheckpointError as error:
            if is_first:
                shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"{error}\nThe checkpoints before it are untouched: mend this, and start the run again"
            ) from error
        doing = f"removing checkpoints older than {target}"
        agree(doing, lambda: _prune(self.root, step, self.retention) if is_first else None)
        return target


def _prepare(folder: Path, state: Mapping[str, JSON]) -> str:
    text = json.dumps(state, indent=1, allow_nan=False)
    for leftover in leftovers(folder.parent):
        logger.warning("removing %s, left by a save that was killed", leftover)
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    return text


def _write_share(folder: Path, share: Share, tensors: Mapping[str, Tensor]) -> dict[str, FileRecord]:
    """Write a rank's file to the disk and return its record. Other threads run on meanwhile."""
    if not tensors:
        return {}
    if not folder.is_dir():
        raise CheckpointError(f"{folder} was made by rank 0 but is not here: share the run folder between the machines")
    return {share.file_name: write_part_file(folder / share.file_name, tensors, share.offsets)}


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
    point_to(target)
    if replaced is not None:
        shutil.rmtree(replaced)


def _prune(root: Path, step: int, retention: Retention) -> None:
    # Newer folders are another history's, or damaged: whoever resumed before them may still want to look at them.
    for old in retention.outdated([done for done in finished_steps(root) if done <= step]):
        shutil.rmtree(set_aside(complete_folder(root, old)))
