"""A save that is killed at any of its steps: what has a checkpoint's name is whole, and the disk has it first."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_kosmos.checkpoint.folders import complete_folder, finished_steps
from megatron_kosmos.checkpoint.load import find_latest
from megatron_kosmos.checkpoint.manifest import verify
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard

ALONE = CheckpointMesh()
STEPS_OF_A_SAVE = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
"""What Python tells its audit hooks of before it does it."""


def save(root: Path, step: int, keep_last: int) -> None:
    shards = [TensorShard("model/weight", torch.full((3, 4), float(step)), None)]
    save_checkpoint(root, step, shards, {"step": step}, ALONE, keep_last)


def is_killed_before(number: int, function: Callable[[], object]) -> bool:
    """Run `function` in a forked process that dies before the operation of that number; False if it has fewer."""
    child = os.fork()
    if child == 0:
        left = [number]

        def count(event: str, _: object) -> None:
            if event in STEPS_OF_A_SAVE:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_between_any_two_operations_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """In whatever it does, writing, naming, pointing, pruning, no folder has a checkpoint's name and is not whole."""
    for step in (1, 2):
        save(tmp_path / "before", step, keep_last=2)
    save(tmp_path / "elsewhere", 3, keep_last=1)  # what is imported late is imported here
    newest = set()
    for number in range(1000):
        root = tmp_path / f"killed_{number}"
        shutil.copytree(tmp_path / "before", root)
        is_killed = is_killed_before(number, partial(save, root, 3, keep_last=1))
        for step in finished_steps(root):
            verify(complete_folder(root, step), ALONE)
        found = find_latest(root)
        assert found is not None
        newest.add(found.name)
        assert (root / (root / "latest").read_text().strip()).is_dir()
        if not is_killed:
            break
        save(root, 3, keep_last=1)
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000003"]
        shutil.rmtree(root)
    assert number > 20
    assert newest == {"step_00000002", "step_00000003"}


def test_the_disk_has_all_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut only what was synced is there, so each file, the folder and the names are, in this order."""
    events: list[str] = []

    def spied(sync: Callable[[int], None]) -> Callable[[int], None]:
        def spy(descriptor: int) -> None:
            events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
            sync(descriptor)

        return spy

    rename = Path.rename

    def spy_rename(self: Path, target: Path) -> Path:
        events.append(f"name {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spied(os.fsync))
    monkeypatch.setattr(os, "fdatasync", spied(os.fdatasync))
    monkeypatch.setattr(Path, "rename", spy_rename)
    save(tmp_path, 3, keep_last=1)
    folder = ".step_00000003.writing"
    shard = f"{folder}/shard-00001-of-00001.safetensors"
    assert set(events[:3]) == {f"sync {shard}", f"sync {folder}/state.json", f"sync {folder}/manifest.json"}
    assert events[3:] == [
        f"sync {folder}",
        "name step_00000003",
        "sync .",
        "sync .latest.writing",
        "name latest",
        "sync .",
    ]
