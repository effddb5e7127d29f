"""Joining model, optimizer and data position to checkpoints, and bringing them back.

A checkpoint holds, for every parameter under its global name, `model/NAME` (the fp32 master; the weight itself where it
is not trained) and `optimizer/NAME/exp_avg` and `/exp_avg_sq`; and as JSON the step, the configuration and the data's
fingerprint. Everything else follows from the step.

What may change across a resume is told in `resumption`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos import __version__
from megatron_kosmos.checkpoint.background import BackgroundSaver
from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.folders import complete_folder, finished_steps
from megatron_kosmos.checkpoint.load import find_latest, load_checkpoint, read_state, read_tensor_names
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import Retention
from megatron_kosmos.checkpoint.tensors import JSON, TensorShard
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.resumption import check_resumption
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.model.names import NamedParameter
from megatron_kosmos.optim.adamw import MOMENTS
from megatron_kosmos.optim.state import MASTER
from megatron_kosmos.parallel.topology import Topology

MODEL_PREFIX = "model/"
"""What weights are named under in a checkpoint, before their global names."""

OPTIMIZER_PREFIX = "optimizer/"
"""What moments are named under, before the global names of their weights."""

ParameterState = dict[str, Tensor]
"""Master and, where the parameter is trained, moments."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint gave this rank."""

    state: Mapping[str, Any]
    """The checkpoint's JSON."""
    parameters: Mapping[str, ParameterState]
    """By global name."""
    trained: frozenset[str]
    """Names of the whole model's parameters that were trained when it was saved."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def updates(self) -> int:
        """Updates that AdamW has made."""
        return int(self.state["updates"])


def checkpoint_mesh(topology: Topology) -> CheckpointMesh:
    """Return a mesh of all ranks; starts a gloo group for plans and host tensors where the run's own is NCCL."""
    group = dist.group.WORLD if topology.device.type == "cpu" else dist.new_group(backend="gloo")
    return CheckpointMesh(topology.tp_rank, topology.tp_size, group)


class CheckpointStore:
    """The checkpoints of one run, in `root`. Saving and loading are collectives over all ranks."""

    def __init__(self, root: Path, topology: Topology, keep_last: int, keep_every: int = 0) -> None:
        """Make this rank's mesh, as `checkpoint_mesh`."""
        self.root, self.topology, self.retention = root, topology, Retention(keep_last, keep_every)
        self.mesh = checkpoint_mesh(topology)

    def latest(self) -> Path | None:
        """Return the newest checkpoint that is whole, None where there is none at all.

        Raises CheckpointError on every rank alike where there are some and all are damaged: to start from the beginning
        would end in the same folder, over what may still be mended.
        """
        newest = find_latest(self.root, self.mesh)
        (steps, *_) = self.mesh.agree(f"listing {self.root}", lambda: finished_steps(self.root))
        if newest is None and steps:
            listed = ", ".join(map(str, steps))
            raise CheckpointError(
                f"no checkpoint in {self.root} is whole (steps {listed}), and the run is not begun again over them: "
                f"restore one, or move the folder away to start from the beginning"
            )
        return newest

    def saver(self, stage: Stage) -> "StageSaver":
        """Plan how `stage` is saved, and allocate the memory that it is copied to."""
        return StageSaver(self, stage)

    def save(self, step: int, stage: Stage, state: Mapping[str, JSON]) -> Path:
        """Write the checkpoint after `step` optimizer steps at once, as `StageSaver` does it, and return its folder."""
        saver = self.saver(stage)
        saver.save(step, state)
        saver.background.wait()
        saver.background.close()
        return complete_folder(self.root, step)

    def load(self, folder: Path, named: Sequence[NamedParameter], run: RunConfig, data: str | None) -> Snapshot:
        """Read what the checkpoint in `folder` holds of this rank's parameters.

        Raises CheckpointError on every rank alike: for damage, for another architecture or order of the data, with what
        differs, and for other training data than the fingerprint `data` (None: any).
        """
        is_first, doing = self.mesh.rank == 0, f"reading what {folder} is"
        ((state, trained), *_) = self.mesh.agree(
            doing, lambda: (read_state(folder), _trained_names(folder)) if is_first else ({}, frozenset[str]())
        )
        check_resumption(folder, state, run, data)
        parameters = {
            one.name: _empty_state(one, (MASTER, *MOMENTS) if one.name in trained else (MASTER,)) for one in named
        }
        shard_dims = {one.name: one.shard_dim for one in named}
        shards = [
            TensorShard(_tensor_name(name, key), tensor, shard_dims[name])
            for name, tensors in parameters.items()
            for key, tensor in tensors.items()
        ]
        load_checkpoint(folder, shards, self.mesh)
        for one in named:
            if one.parameter.requires_grad and one.name not in trained:
                parameters[one.name] |= {key: torch.zeros_like(parameters[one.name][MASTER]) for key in MOMENTS}
        return Snapshot(state, parameters, trained)


class StageSaver:
    """Saves one stage at one step after the other, while it goes on training."""

    def __init__(self, store: CheckpointStore, stage: Stage) -> None:
        """Plan with all ranks who writes what, and allocate memory. Raises CheckpointError on every rank alike."""
        self.stage, optimizer = stage, stage.optimizer.state
        trained = [one.parameter for one in stage.named if one.parameter.requires_grad]
        self._owners = dict(zip(trained, optimizer.owners(trained), strict=True))
        shards = [
            TensorShard(
                _tensor_name(one.name, key),
                torch.empty(optimizer.shape_of(one.parameter), dtype=torch.float32, device="meta"),
                one.shard_dim,
            )
            for one in stage.named
            if not one.is_tied_copy and self._may_write(one, store.topology)
            for key in ((MASTER, *MOMENTS) if one.parameter.requires_grad else (MASTER,))
        ]
        device = store.topology.device
        self.background = BackgroundSaver(store.root, shards, store.mesh, store.retention, device)

    def _may_write(self, one: NamedParameter, topology: Topology) -> bool:
        owner = self._owners.get(one.parameter)
        return owner is None or owner.rank == topology.dp_rank

    def save(self, step: int, state: Mapping[str, JSON]) -> None:
        """Copy what there is after `step` optimizer steps, with `state` for its JSON, and start to write it.

        Waits for the save before it. Raises SavingFailed on every rank alike if that failed.
        """
        updates = self.stage.optimizer.state.updates
        self.background.save(step, self._tensors(), {**state, "step": step, "updates": updates, "version": __version__})

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this rank may write. What ZeRO cuts is put together by collectives over the data ranks."""
        optimizer = self.stage.optimizer.state
        for one in self.stage.named:
            if not one.parameter.requires_grad:
                yield _tensor_name(one.name, MASTER), optimizer.frozen_weight(one.parameter)
                continue
            owner = self._owners[one.parameter]
            state = optimizer.read(one.parameter) if owner is None else optimizer.read_on(owner, one.parameter)
            for key, tensor in state.items():
                yield _tensor_name(one.name, key), tensor


def restore_weights(named: Iterable[NamedParameter], snapshot: Snapshot) -> None:
    """Set the weights that the model computes with, before ZeRO takes them over."""
    with torch.no_grad():
        for one in named:
            one.parameter.copy_(snapshot.parameters[one.name][MASTER])


def restore_optimizer(stage: Stage, snapshot: Snapshot) -> None:
    """Set masters, moments and the count of updates."""
    trained = (named for named in stage.named if named.parameter.requires_grad)
    stage.optimizer.state.write({named.parameter: snapshot.parameters[named.name] for named in trained})
    stage.optimizer.state.set_updates(snapshot.updates)


def _empty_state(one: NamedParameter, keys: Iterable[str]) -> ParameterState:
    return {key: torch.empty(one.parameter.shape, dtype=torch.float32) for key in keys}


def _trained_names(folder: Path) -> frozenset[str]:
    """Return the parameters that have moments in a checkpoint."""
    parts = (name.removeprefix(OPTIMIZER_PREFIX).rpartition("/") for name in read_tensor_names(folder))
    return frozenset(name for name, _, key in parts if key in MOMENTS)


def _tensor_name(name: str, key: str) -> str:
    return MODEL_PREFIX + name if key == MASTER else f"{OPTIMIZER_PREFIX}{name}/{key}"
