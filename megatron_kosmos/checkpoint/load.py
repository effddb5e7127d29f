"""Reading a checkpoint: into the ranks of any layout, or whole in one process for conversion and inspection."""

import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron_kosmos.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_kosmos.checkpoint.folders import complete_folder, finished_steps, leftovers
from megatron_kosmos.checkpoint.manifest import STATE_FILE, Manifest, Show, TensorRecord, verify, verify_file
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.tensors import JSON, SHARDING, LoadShards, TensorShard, by_name
from megatron_kosmos.tensor_file import read_ahead

logger = logging.getLogger(__name__)

ALONE = CheckpointMesh()
"""One process, no process group."""


def find_latest(root: Path, mesh: CheckpointMesh = ALONE) -> Path | None:
    """Return the newest checkpoint under `root` that is whole, or None (a collective over `mesh.group`).

    Every file is read to check its sum; the ranks share that. Damaged and unfinished checkpoints are passed over with a
    warning.
    """
    (steps, *_) = mesh.agree(f"listing {root}", lambda: finished_steps(root))
    if mesh.rank == 0:
        for leftover in leftovers(root):
            logger.warning("passing over %s: its save or removal was killed", leftover)
    for step in steps:
        folder = complete_folder(root, step)
        try:
            verify(folder, mesh)
        except DamagedCheckpointError as error:
            if mesh.rank == 0:
                logger.warning("passing over %s", error)
        else:
            return folder
    return None


def load_checkpoint(
    folder: Path, shards: Sequence[TensorShard], mesh: CheckpointMesh, *, prefix: str = "", contents: bool = True
) -> dict[str, JSON]:
    """Fill each shard's `local` in place and return the state (a collective over `mesh.group`).

    The layout may differ from the one that saved. A floating-point tensor takes the dtype that it is loaded into.
    Of the checkpoint's tensors those count whose name begins with `prefix`. Without `contents` only the files' sizes
    are checked, for what `find_latest` has just read.

    Raises, the same on every rank and before any tensor is changed: DamagedCheckpointError if a byte is not as it was
    written; CheckpointError with a list of every name that the checkpoint lacks, that no rank asks for, or whose shape
    or kind of dtype differs.
    """
    manifest = verify(folder, mesh, contents=contents)
    doing = f"loading {folder}"
    named = by_name(shards, doing, mesh)
    stored = {name: record for name, record in manifest.tensors.items() if name.startswith(prefix)}
    _check_fit(folder, stored, named, mesh)
    mesh.together(doing, lambda: _read_shards(folder, named, mesh))
    return mesh.agree(doing, lambda: _parse_state(folder))[mesh.rank]


def read_state(folder: Path) -> dict[str, JSON]:
    """Return the state that was saved with the tensors. Raises DamagedCheckpointError."""
    verify_file(folder, Manifest.read(folder), STATE_FILE)
    return _parse_state(folder)


def read_tensor_names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return each whole tensor's name and shape; only the manifest is read. Raises DamagedCheckpointError."""
    return {name: record.shape for name, record in Manifest.read(folder).tensors.items()}


def read_tensors(folder: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors on the CPU, one at a time, in the order of `names` (all if None). One process, no group.

    Every file's checksum is checked before the first tensor. Raises DamagedCheckpointError, or CheckpointError if the
    checkpoint lacks a name.
    """
    tensors = StoredTensors(folder)
    wanted = tensors.shapes if names is None else names
    lacking = sorted(set(wanted) - tensors.shapes.keys())
    if lacking:
        raise CheckpointError(f"the checkpoint {folder} has no tensor named {', '.join(lacking)}")
    for name in wanted:
        yield name, tensors.read(name)


class StoredTensors:
    """The whole tensors of a checkpoint, each read when it is asked for. One process, no group.

    Every file's checksum is checked at the start, or without `contents` its size only; `show` is told how far that is.
    Raises DamagedCheckpointError.
    """

    def __init__(self, folder: Path, *, contents: bool = True, show: Show | None = None) -> None:
        self.folder = folder
        self.manifest = verify(folder, ALONE, contents=contents, show=show)
        self._files: dict[str, list[tuple[Path, list[int]]]] = {}
        """The files that hold a part of a tensor, and where the part begins in the whole."""
        self._begun: set[Path] = set()
        """Files that a tensor was read of."""
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for name, place in json.loads(file.metadata()[SHARDING]).items():
                        self._files.setdefault(name, []).append((path, place["saved_offsets"]))
            except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DamagedCheckpointError(
                    folder, [f"{path.name} has a header that says nothing: {error}"]
                ) from error
        lost = sorted(self.manifest.tensors.keys() - self._files.keys())
        if lost:
            raise DamagedCheckpointError(folder, [f"{name} is in no file" for name in lost])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each whole tensor's shape by its name."""
        return {name: record.shape for name, record in self.manifest.tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, one of `shapes`, on the CPU. It may lie in the file: don't change it in place."""
        record, parts = self.manifest.tensors[name], self._files[name]
        whole: Tensor | None = None
        for path, offsets in parts:
            if path not in self._begun:
                read_ahead(path)
                self._begun.add(path)
            # A file stays mapped, and what was read of it in memory, while it is open: so each time anew.
            with safe_open(path, framework="pt") as file:
                part: Tensor = file.get_tensor(name)
            if part.shape == record.shape:
                return part
            if whole is None:
                whole = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))] = part
        assert whole is not None, f"{name} is in no file"
        return whole


def _check_fit(
    folder: Path, stored: Mapping[str, TensorRecord], named: Mapping[str, TensorShard], mesh: CheckpointMesh
) -> None:
    problems = []
    for name, shard in named.items():
        shape = tuple(shard.global_shape(mesh))
        if name not in stored:
            problems.append(f"{name} {list(shape)} is missing from the checkpoint")
        elif stored[name].shape != shape:
            problems.append(f"{name} is {list(stored[name].shape)} in the checkpoint, {list(shape)} is wanted")
        elif getattr(torch, stored[name].dtype).is_floating_point != shard.local.is_floating_point():
            problems.append(f"{name} is {stored[name].dtype} in the checkpoint, {shard.local.dtype} is wanted")
    asked_by_rank = mesh.gather((problems, list(named)))
    found = {problem for of_rank, _ in asked_by_rank for problem in of_rank}
    left_over = stored.keys() - {name for _, of_rank in asked_by_rank for name in of_rank}
    found |= {f"{name} {list(stored[name].shape)} is in the checkpoint, but nothing asks for it" for name in left_over}
    if found:
        listed = "\n".join(f"  - {problem}" for problem in sorted(found))
        raise CheckpointError(f"the checkpoint {folder} does not fit this run:\n{listed}")


def _read_shards(folder: Path, named: Mapping[str, TensorShard], mesh: CheckpointMesh) -> None:
    tensors: dict[str, Any] = {name: shard.local for name, shard in named.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # One process alone is meant to be alone.
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=LoadShards(named, mesh),
            process_group=mesh.group,
            no_dist=mesh.group is None,
        )


def _parse_state(folder: Path) -> dict[str, JSON]:
    state: dict[str, JSON] = json.loads((folder / STATE_FILE).read_text("utf-8"))
    return state
