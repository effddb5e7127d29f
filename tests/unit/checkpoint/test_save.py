"""Saving in one process: what a folder holds, what stays, and what a death or a failure in the middle leaves."""

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.load import find_latest, load_checkpoint, read_tensors
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import Retention, save_checkpoint
from megatron_kosmos.checkpoint.tensors import JSON, TensorShard

ALONE = CheckpointMesh()


def shards(value: float = 0.0) -> list[TensorShard]:
    """A weight, its optimizer state in another dtype, and a count."""
    return [
        TensorShard("model/weight", torch.arange(12.0).reshape(3, 4) + value, shard_dim=1),
        TensorShard("optimizer/weight/exp_avg", torch.full((3, 4), value, dtype=torch.bfloat16), shard_dim=1),
        TensorShard("optimizer/weight/step", torch.tensor(2**53 + 1), shard_dim=None),
    ]


def save(root: Path, step: int, keep_last: int = 9, state: dict[str, JSON] | None = None) -> Path:
    return save_checkpoint(root, step, shards(step), state if state is not None else {"step": step}, ALONE, keep_last)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_in_child(function: Callable[[], object]) -> int:
    """Return the wait status of a forked process that runs `function`."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def test_a_folder_holds_plain_safetensors_and_json_with_their_checksums(tmp_path: Path) -> None:
    folder = save(tmp_path, 350, state={"step": 350, "rng": [1, 2.5, None, True, {"a": "ä"}]})
    assert folder == tmp_path / "step_00000350"
    names = {path.name for path in folder.iterdir()}
    (tensor_file,) = names - {"state.json", "manifest.json"}
    tensors = load_file(folder / tensor_file)  # Hugging Face's own reader: nothing of ours or torch's is needed
    assert {name: torch.equal(tensors[name], local) for name, local in ((s.name, s.local) for s in shards(350))} == (
        dict.fromkeys(["model/weight", "optimizer/weight/exp_avg", "optimizer/weight/step"], True)
    )
    assert json.loads((folder / "state.json").read_text()) == {"step": 350, "rng": [1, 2.5, None, True, {"a": "ä"}]}
    listed = json.loads((folder / "manifest.json").read_text())["content"]["files"]
    assert listed == {
        name: {
            "num_bytes": len((folder / name).read_bytes()),
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in (tensor_file, "state.json")
    }
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "state.json").stat().st_mode}
    assert names_in(tmp_path) == ["latest", folder.name]
    assert (tmp_path / "latest").read_text() == f"{folder.name}\n"


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        save(tmp_path, step, keep_last=2)
    assert names_in(tmp_path) == ["latest", "step_00000002", "step_00000003", "step_00000010"]
    save(tmp_path, 11, keep_last=1)
    assert names_in(tmp_path) == ["latest", "step_00000011"]


def test_those_of_every_so_many_steps_stay_for_good() -> None:
    assert Retention(last=2, every=100).outdated([500, 450, 400, 350, 300, 100, 50, 0]) == [350, 50]
    assert Retention(last=1).outdated([500, 400]) == [400]
    assert Retention(last=3, every=7).outdated([5, 3]) == []


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, state={"try": 1})
    save(tmp_path, 5, state={"try": 2})
    assert load_checkpoint(tmp_path / "step_00000005", shards(), ALONE) == {"try": 2}
    assert names_in(tmp_path) == ["latest", "step_00000005"]


def test_tensors_may_be_views_of_one_buffer(tmp_path: Path) -> None:
    buffer = torch.arange(20.0)
    parts = [TensorShard("a", buffer[:6].view(2, 3), 0), TensorShard("b", buffer[6:], None)]
    folder = save_checkpoint(tmp_path, 1, parts, {}, ALONE, 1)
    read = dict(read_tensors(folder))
    assert torch.equal(read["a"], buffer[:6].view(2, 3))
    assert torch.equal(read["b"], buffer[6:])
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 1000


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}], ids=["nan", "set"])
def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, bad: JSON) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"saving .*step_00000002 failed on rank 0: (ValueError|TypeError)"):
        save(tmp_path, 2, state={"loss": bad})
    assert names_in(tmp_path) == ["latest", "step_00000001"]


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = [TensorShard("w", torch.ones(2), None), TensorShard("w", torch.zeros(2), None)]
    with pytest.raises(CheckpointError, match="several tensors of one rank are named w"):
        save_checkpoint(tmp_path, 1, twice, {}, ALONE, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_bytes_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    good = save(tmp_path, 1)

    def fill_the_disk() -> None:
        limit_file_size(100)  # Python ignores SIGXFSZ: the write fails with an OSError, as it does on a full disk
        with pytest.raises(CheckpointError, match=r"step_00000002 failed on rank 0: .*File too large.*\n.*untouched"):
            save(tmp_path, 2)

    assert run_in_child(fill_the_disk) == 0
    assert names_in(tmp_path) == ["latest", good.name]
    assert find_latest(tmp_path) == good


@pytest.mark.parametrize("dies_in", ["tensors", "state.json"])
def test_a_save_that_dies_while_it_writes_leaves_the_previous_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dies_in: str
) -> None:
    good = save(tmp_path, 1)
    limit = 100 if dies_in == "tensors" else 2000

    def die_while_writing() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # now the kernel ends the process within write(2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_file_size(limit)
        save(tmp_path, 2, state={"long": "x" * 4000})

    assert os.WTERMSIG(run_in_child(die_while_writing)) == signal.SIGXFSZ
    (leftover,) = tmp_path.glob(".*")
    assert leftover.name == ".step_00000002.writing"
    sizes = {path.suffix: path.stat().st_size for path in leftover.iterdir()}
    assert len(sizes) == 1 if dies_in == "tensors" else sizes[".json"] == limit

    assert find_latest(tmp_path) == good
    assert f"passing over {leftover}" in caplog.text
    target = shards()
    assert load_checkpoint(good, target, ALONE) == {"step": 1}
    assert torch.equal(target[0].local, shards(1)[0].local)

    (tmp_path / ".step_00000000.removing").mkdir()
    save(tmp_path, 3)
    assert names_in(tmp_path) == ["latest", "step_00000001", "step_00000003"]
    assert f"removing {leftover}" in caplog.text


@pytest.mark.parametrize("num_saves", [1, 2, 5])
def test_a_save_killed_by_signal_9_leaves_a_whole_checkpoint(tmp_path: Path, num_saves: int) -> None:
    progress, report = os.pipe()

    def save_for_ever() -> None:
        for step in range(10**6):
            save(tmp_path, step, keep_last=2)
            os.write(report, b"x")

    child = os.fork()
    if child == 0:
        try:
            save_for_ever()
        finally:
            os._exit(1)
    os.close(report)
    for _ in range(num_saves):
        assert os.read(progress, 1) == b"x"
    os.kill(child, signal.SIGKILL)  # somewhere in the next save
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    os.close(progress)

    latest = find_latest(tmp_path)
    assert latest is not None
    step = int(latest.name.removeprefix("step_"))
    assert step >= num_saves - 1
    target = shards()
    assert load_checkpoint(latest, target, ALONE) == {"step": step}
    assert torch.equal(target[0].local, shards(step)[0].local)
    save(tmp_path, step + 1)
    assert not list(tmp_path.glob(".step_*"))
