"""Saving beside the training: no rank waits for the disk, all hear of the end, and of a failure, at the same step."""

import logging
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.checkpoint import background
from megatron_kosmos.checkpoint.background import BackgroundSaver
from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.folders import complete_folder
from megatron_kosmos.checkpoint.load import find_latest, load_checkpoint
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import Retention, save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.callbacks import Checkpointing
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.engine.trainer import StepReport
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

pytestmark = pytest.mark.distributed

ROWS, COLUMNS = 6, 50
CPU = torch.device("cpu")


def mesh_of_two() -> CheckpointMesh:
    return CheckpointMesh(tp_rank=dist.get_rank(), tp_size=2, group=dist.group.WORLD)


def shards(value: float) -> list[TensorShard]:
    """Half a matrix on each rank, and a vector on both."""
    half = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS).chunk(2)[dist.get_rank()] + value
    return [TensorShard("matrix", half.contiguous(), 0), TensorShard("vector", torch.full((COLUMNS,), value), None)]


def tensors(value: float) -> Iterator[tuple[str, Tensor]]:
    return ((shard.name, shard.local) for shard in shards(value))


def saver_in(root: Path) -> BackgroundSaver:
    planned = [TensorShard(shard.name, shard.local.to("meta"), shard.shard_dim) for shard in shards(0)]
    return BackgroundSaver(root, planned, mesh_of_two(), Retention(2), CPU)


def is_there(root: Path, step: int) -> bool:
    return complete_folder(root, step).exists()


def save_behind_a_gate(root: Path) -> dict[str, list[bool]]:
    """Start a save that can't begin on rank 0, train on, open the gate, train on until it ended, save twice more."""
    saver = saver_in(root)
    gate = os.pipe()
    if dist.get_rank() == 0:
        saver._thread.submit(os.read, gate[0], 1)  # what the thread is busy with
    saver.save(1, tensors(1), {"step": 1})
    was_under_way, was_there = [], []
    for _ in range(5):
        train_a_step()
        was_under_way.append(saver.poll())
        was_there.append(is_there(root, 1))
    os.write(gate[1], b"x")
    while saver.poll():
        train_a_step()
    was_there.append(is_there(root, 1))
    saver.save(2, tensors(2), {"step": 2})
    saver.save(3, tensors(3), {"step": 3})  # waits for the one before it
    was_there.append(is_there(root, 2))
    saver.wait()
    was_there.append(is_there(root, 3))
    saver.close()
    return {"under way": was_under_way, "there": was_there}


def train_a_step() -> None:
    """Use the group that polling uses too."""
    dist.all_reduce(torch.ones(3))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    for result in run_ranks(save_behind_a_gate, 2, tmp_path):
        assert result == {"under way": [True] * 5, "there": [False] * 5 + [True] * 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    for step in (2, 3):
        assert run_ranks(load, 2, complete_folder(tmp_path, step)) == [float(step)] * 2


def load(folder: Path) -> float:
    """Return the value that was added to all elements."""
    targets = shards(-1)
    load_checkpoint(folder, targets, mesh_of_two())
    (value,) = {
        float(part) for got, base in zip(targets, shards(0), strict=True) for part in (got.local - base.local).unique()
    }
    return value


def save_where_rank_1_has_no_room(root: Path) -> list[tuple[int, str]]:
    saver = saver_in(root)
    saver.save(1, tensors(1), {"step": 1})
    saver.wait()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    failures = []
    for waits in (False, True):
        saver.save(2, tensors(2), {"step": 2})
        steps = 0
        try:
            while saver.poll():
                train_a_step()
                steps += 1
                if waits:
                    saver.wait()
        except CheckpointError as error:
            failures.append((steps, str(error)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(3, tensors(3), {"step": 3})
    saver.wait()
    saver.close()
    return failures


def test_a_full_disk_on_one_rank_reaches_all_at_the_same_step(tmp_path: Path) -> None:
    failures, others = run_ranks(save_where_rank_1_has_no_room, 2, tmp_path)
    assert failures == others
    assert len(failures) == 2
    for _, message in failures:
        assert f"saving {tmp_path}/step_00000002 failed on rank 1: " in message
        assert "File too large" in message
        assert "The checkpoints before it are untouched: " in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]


def save_to_a_disk_of_each_rank(root: Path, makes_the_folder: bool) -> str:
    """Save as two machines would that share no folder, the second with one that an earlier save left or without."""
    mine = root / f"disk_{dist.get_rank()}"
    if dist.get_rank() == 1 and makes_the_folder:
        (mine / ".step_00000001.writing").mkdir(parents=True)
    with pytest.raises(CheckpointError) as raised:
        save_checkpoint(mine, 1, shards(1), {}, mesh_of_two(), keep_last=1)
    return str(raised.value).partition("failed")[2]


@pytest.mark.parametrize("makes_the_folder", [True, False])
def test_machines_that_share_no_folder_are_told_so(makes_the_folder: bool, tmp_path: Path) -> None:
    message, other = run_ranks(save_to_a_disk_of_each_rank, 2, tmp_path, makes_the_folder)
    assert "is not here: share the run folder" in message
    assert other == message
    assert not list(tmp_path.glob("disk_*/step_*"))


def leave_amid_a_save(root: Path, step: int, dies: bool) -> None:
    """Rank 0's training fails while the checkpoint is written; rank 1's goes on, or is killed before it writes."""
    saver = saver_in(root)
    gate = os.pipe()
    if dist.get_rank() == 1:
        saver._thread.submit(os.read, gate[0], 1)
    saver.save(step, tensors(step), {"step": step})
    if dist.get_rank() == 1 and dies:
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(gate[1], b"x")
    try:
        if dist.get_rank() == 0:
            raise ValueError("the training failed")
    except ValueError:
        pass
    finally:
        saver.close()


def fail_amid_a_save_without_room(root: Path) -> list[str]:
    """Return what is logged as an error where the training fails while a save does, too."""
    told: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(background.__name__).addHandler(handler)
    saver = saver_in(root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    saver.save(1, tensors(1), {"step": 1})
    saver.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return told


def test_a_save_that_fails_beside_the_training_is_told_as_an_error(tmp_path: Path) -> None:
    for (message,) in run_ranks(fail_amid_a_save_without_room, 2, tmp_path):
        for rank in (0, 1):
            assert f"rank {rank}: [Errno 27] File too large: '{tmp_path}" in message


def test_what_is_under_way_is_finished_after_an_error(tmp_path: Path) -> None:
    run_ranks(leave_amid_a_save, 2, tmp_path, 1, False)
    assert find_latest(tmp_path) == complete_folder(tmp_path, 1)


def test_a_rank_that_is_killed_amid_a_save_leaves_the_previous(tmp_path: Path) -> None:
    run_ranks(leave_amid_a_save, 2, tmp_path, 1, False)
    with pytest.raises(RankFailure, match="rank 1 died"):
        run_ranks(leave_amid_a_save, 2, tmp_path, 2, True)
    assert find_latest(tmp_path) == complete_folder(tmp_path, 1)


def checkpoints_after_each_step(root: Path) -> list[list[str]]:
    """Save after each of five steps, waiting for the disk, and list what is there."""
    run = tiny_run(checkpoint__asynchronous=False, checkpoint__every=1)
    topology = build_topology(run.parallel, CPU)
    stage, _ = build_stage(run, topology)
    store = CheckpointStore(root, topology, keep_last=1, keep_every=2)
    saving = Checkpointing(run, runner := StepRunner(run, stage, topology), store, dict)
    result = runner.train(0, rank_batches(0, "tttt", topology))
    listed = []
    for step in range(1, 6):
        saving.after_step(StepReport(step, False, result, seconds=1.0))
        listed.append(sorted(path.name.removeprefix("step_0000000") for path in root.glob("step_*")))
    saving.close()
    return listed


def test_a_run_can_wait_for_the_disk_and_keep_some_for_good(tmp_path: Path) -> None:
    (listed,) = run_ranks(checkpoints_after_each_step, 1, tmp_path)
    assert listed == [["1"], ["2"], ["2", "3"], ["2", "4"], ["2", "4", "5"]]
