"""Loading in one process: values, fit, damage, and the choice of a checkpoint to resume from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_kosmos.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_kosmos.checkpoint.load import (
    StoredTensors,
    find_latest,
    load_checkpoint,
    read_state,
    read_tensor_names,
    read_tensors,
)
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard

ALONE = CheckpointMesh()
VALUES = {
    "model/weight": torch.arange(12.0).reshape(3, 4),
    "model/half": torch.linspace(-1, 1, 8, dtype=torch.bfloat16),
    "optimizer/step": torch.tensor(2**53 + 1),
    "optimizer/empty": torch.empty(0, 4),
}


def shards(values: dict[str, torch.Tensor]) -> list[TensorShard]:
    return [TensorShard(name, value.clone(), shard_dim=None) for name, value in values.items()]


def blank() -> list[TensorShard]:
    return shards({name: torch.full_like(value, 7) for name, value in VALUES.items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 4, shards(VALUES), {"step": 4}, ALONE, 9)


def test_what_was_saved_comes_back_in_place(folder: Path) -> None:
    target = blank()
    assert load_checkpoint(folder, target, ALONE) == {"step": 4}
    for shard in target:
        assert torch.equal(shard.local, VALUES[shard.name]), shard.name


def test_a_floating_tensor_takes_the_dtype_it_is_loaded_into(folder: Path) -> None:
    target = shards({**VALUES, "model/weight": torch.zeros(3, 4, dtype=torch.bfloat16), "model/half": torch.zeros(8)})
    load_checkpoint(folder, target, ALONE)
    assert torch.equal(target[0].local, VALUES["model/weight"].bfloat16())
    assert torch.equal(target[1].local, VALUES["model/half"].float())


def test_every_misfit_is_listed_and_nothing_is_changed(folder: Path) -> None:
    target = shards(
        {"model/weight": torch.zeros(4, 4), "model/half": torch.zeros(8).long(), "model/new": torch.zeros(2)}
    )
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(folder, target, ALONE)
    assert str(raised.value).splitlines() == [
        f"the checkpoint {folder} does not fit this run:",
        "  - model/half is bfloat16 in the checkpoint, torch.int64 is wanted",
        "  - model/new [2] is missing from the checkpoint",
        "  - model/weight is [3, 4] in the checkpoint, [4, 4] is wanted",
        "  - optimizer/empty [0, 4] is in the checkpoint, but nothing asks for it",
        "  - optimizer/step [] is in the checkpoint, but nothing asks for it",
    ]
    assert all(not shard.local.any() for shard in target)


def test_whole_tensors_are_streamed_without_ranks(folder: Path) -> None:
    assert read_state(folder) == {"step": 4}
    assert read_tensor_names(folder) == {name: tuple(value.shape) for name, value in VALUES.items()}
    read = dict(read_tensors(folder))
    assert {name: (value.dtype, value.tolist()) for name, value in read.items()} == {
        name: (value.dtype, value.tolist()) for name, value in VALUES.items()
    }
    assert [name for name, _ in read_tensors(folder, ["optimizer/step", "model/half"])] == [
        "optimizer/step",
        "model/half",
    ]
    with pytest.raises(CheckpointError, match="has no tensor named lost, other"):
        list(read_tensors(folder, ["other", "model/half", "lost"]))


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def truncate(folder: Path) -> None:
    with tensor_file(folder).open("r+b") as stream:
        stream.truncate(tensor_file(folder).stat().st_size - 1)


def flip_a_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def change_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["content"]["tensors"]["model/weight"]["shape"] = [4, 3]
    path.write_text(json.dumps(document))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"has \d+ bytes instead of \d+"),
    "flipped bit in a tensor": (lambda folder: flip_a_bit(tensor_file(folder), -1), "not its sha256 checksum"),
    "flipped bit in a header": (lambda folder: flip_a_bit(tensor_file(folder), 60), "not its sha256 checksum"),
    "missing file": (lambda folder: tensor_file(folder).unlink(), r"safetensors is missing"),
    "left-over file": (
        lambda folder: (folder / "other.safetensors").write_bytes(b""),
        "other.safetensors does not belong to it",
    ),
    "missing state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "damaged state": (lambda folder: flip_a_bit(folder / "state.json", 8), "state.json has its size but not"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"sha256": "'),
        "manifest.json cannot be trusted",
    ),
    "changed manifest": (change_the_manifest, "manifest.json cannot be trusted: its checksum differs"),
    "manifest that is no object": (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be trusted"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_before_a_byte_is_used(
    folder: Path, damage: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = save_checkpoint(folder.parent, 8, shards(VALUES), {"step": 8}, ALONE, 9)
    assert find_latest(folder.parent) == newest
    damage(newest)
    target = blank()
    with pytest.raises(DamagedCheckpointError, match=message):
        load_checkpoint(newest, target, ALONE)
    assert all(torch.equal(shard.local, before.local) for shard, before in zip(target, blank(), strict=True))
    with pytest.raises(DamagedCheckpointError, match=message):
        next(read_tensors(newest))
    if "manifest" in message:
        with pytest.raises(DamagedCheckpointError, match=message):
            read_tensor_names(newest)
    if "state" in message or "manifest" in message:
        with pytest.raises(DamagedCheckpointError, match=message):
            read_state(newest)
    assert find_latest(folder.parent) == folder
    assert f"passing over the checkpoint {newest} is damaged" in caplog.text


def test_sizes_alone_tell_of_a_file_that_is_short(folder: Path) -> None:
    flip_a_bit(tensor_file(folder), -1)
    assert StoredTensors(folder, contents=False).shapes.keys() == VALUES.keys()
    truncate(folder)
    with pytest.raises(DamagedCheckpointError, match=r"has \d+ bytes instead of \d+"):
        StoredTensors(folder, contents=False)


def test_without_a_whole_checkpoint_there_is_none(folder: Path, tmp_path: Path) -> None:
    truncate(folder)
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "nothing here") is None


def test_a_folder_that_is_no_checkpoint_is_said_to_be_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json is missing: the save did not finish"):
        load_checkpoint(tmp_path / "step_00000001", [], ALONE)
