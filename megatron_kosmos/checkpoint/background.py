"""Saving beside the training: it waits for a copy in host memory, and a thread takes that to the disk.

Threads and groups: the thread's collectives run on a group of their own, in the order of the saves, and no other thread
uses it. So they wait for the other ranks' disks and for nothing else; the training's ranks may be anywhere meanwhile.
What became of a save is asked by the training's own thread, on the training's group, so that all ranks hear of it, and
of a failure, at the same step.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.checkpoint.errors import SavingFailed
from megatron_kosmos.checkpoint.mesh import CheckpointMesh, describe
from megatron_kosmos.checkpoint.save import CheckpointWriter, Retention
from megatron_kosmos.checkpoint.share import Share, plan_shares
from megatron_kosmos.checkpoint.tensors import JSON, TensorShard

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Bytes: a cache line, and a multiple of every element's width."""


class HostBuffer:
    """Memory for what a rank writes of a checkpoint, allocated once."""

    def __init__(self, share: Share, device: torch.device) -> None:
        """Allocate for `share`, and touch every page; pinned where tensors come from a GPU (`device`)."""
        begins, end = dict[str, int](), 0
        for name, part in share.parts.items():
            begins[name], end = end, end + -(-part.local.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._bytes = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda").zero_()
        self._device = device
        self.tensors: dict[str, Tensor] = {
            name: self._bytes[begins[name] :][: part.local.nbytes].view(part.local.dtype).view(part.local.shape)
            for name, part in share.parts.items()
        }

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self._bytes.nbytes

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy those of the named tensors that this rank writes; one at a time is there, the rest is passed over."""
        missing = set(self.tensors)
        for name, tensor in tensors:
            if name in self.tensors:
                self.tensors[name].copy_(tensor, non_blocking=True)
                missing.discard(name)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        assert not missing, f"planned for, but not given: {sorted(missing)}"


class BackgroundSaver:
    """Saves the checkpoints of a run, one at a time. All methods but `close` are collectives over `mesh.group`."""

    def __init__(
        self,
        root: Path,
        shards: Sequence[TensorShard],
        mesh: CheckpointMesh,
        retention: Retention,
        device: torch.device,
    ) -> None:
        """Plan who writes what of `shards`, which may be on the meta device, and allocate memory for it.

        The tensors will come from `device`. Raises CheckpointError on every rank alike, as `plan_shares`.
        """
        share = plan_shares(shards, f"planning the checkpoints in {root}", mesh)
        self._buffer = HostBuffer(share, device)
        group = None if mesh.group is None else dist.new_group(dist.get_process_group_ranks(mesh.group), backend="gloo")
        self._writer = CheckpointWriter(root, share, CheckpointMesh(mesh.tp_rank, mesh.tp_size, group), retention)
        self._mesh = mesh
        # On Linux niceness is a thread's own: where cores are scarce, training goes first.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=os.nice, initargs=(10,))
        self._saving: Future[Path] | None = None

    @property
    def num_bytes(self) -> int:
        """Host memory that this rank's copy takes."""
        return self._buffer.num_bytes

    def save(self, step: int, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, JSON]) -> None:
        """Copy the named `tensors` and start to write them; returns with the copy, after any save under way."""
        self.wait()
        self._buffer.fill(tensors)
        self._saving = self._thread.submit(self._writer.write, step, self._buffer.tensors, state)

    def poll(self) -> bool:
        """Return whether a save is under way. Raises SavingFailed on every rank alike when one has failed."""
        if self._saving is not None and all(self._mesh.gather(self._saving.done())):
            self.wait()
        return self._saving is not None

    def wait(self) -> None:
        """Wait for the save that is under way, if one is. Raises SavingFailed on every rank alike if it failed."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        failure = _failure(saving)
        failures = [failure for failure in self._mesh.gather(failure) if failure is not None]
        if failures:
            raise SavingFailed(failures[0])
        logger.info("saved %s", saving.result())

    def close(self) -> None:
        """Wait for this rank's part in a save that is under way, after an error elsewhere too; not a collective."""
        self._thread.shutdown()
        if self._saving is not None:
            failure = _failure(self._saving)
            if failure is None:
                logger.info("saved %s", self._saving.result())
            else:
                logger.error("%s", failure)


def _failure(saving: "Future[Path]") -> str | None:
    error = saving.exception()
    return None if error is None else describe(error)
