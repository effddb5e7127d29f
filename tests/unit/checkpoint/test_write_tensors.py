"""Checkpoints written tensor by tensor are checkpoints like others."""

from pathlib import Path

import pytest
import torch

from megatron_kosmos.checkpoint.errors import DamagedCheckpointError
from megatron_kosmos.checkpoint.load import StoredTensors, find_latest, load_checkpoint, read_state
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.tensors import TensorShard
from megatron_kosmos.checkpoint.write_tensors import TensorWriter

TENSORS = {f"model/{number}": torch.randn(3, 2 + number) for number in range(5)}


def write(root: Path, max_file_bytes: int) -> Path:
    folder = root / "step_00000000"
    folder.mkdir()
    writer = TensorWriter(folder, max_file_bytes)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close(0, {"step": 0, "data": None})
    return folder


@pytest.mark.parametrize(("max_file_bytes", "num_files"), [(1 << 20, 1), (80, 4), (1, 5)])
def test_any_number_of_files_is_one_checkpoint(max_file_bytes: int, num_files: int, tmp_path: Path) -> None:
    folder = write(tmp_path, max_file_bytes)
    assert len(list(folder.glob("*.safetensors"))) == num_files
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "state.json").stat().st_mode}
    assert find_latest(tmp_path) == folder
    assert read_state(folder) == {"step": 0, "data": None}
    stored = StoredTensors(folder)
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in TENSORS.items())
    shards = [TensorShard(name, torch.empty(tensor.shape), None) for name, tensor in TENSORS.items()]
    assert load_checkpoint(folder, shards, CheckpointMesh()) == {"step": 0, "data": None}
    assert all(torch.equal(shard.local, TENSORS[shard.name]) for shard in shards)


def test_damage_is_found(tmp_path: Path) -> None:
    file = sorted(write(tmp_path, 80).glob("*.safetensors"))[2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=file.name):
        StoredTensors(file.parent)
    assert find_latest(tmp_path) is None
