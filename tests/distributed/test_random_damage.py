"""Whatever happens to a checkpoint's files is noticed before a byte of them is used: 200 random damages, one by one."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_kosmos.checkpoint.errors import DamagedCheckpointError
from megatron_kosmos.checkpoint.folders import complete_folder
from megatron_kosmos.checkpoint.load import find_latest, load_checkpoint, read_tensors
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

ROWS, COLUMNS, NUM_DAMAGES = 12, 40, 200
ALONE = CheckpointMesh()


def whole(step: int) -> dict[str, torch.Tensor]:
    """Three tensors of the same sizes at every step, and so files of the same sizes."""
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(ROWS, COLUMNS, generator=draw) for name in ("model/a", "model/b", "optimizer/a/exp_avg")}


def save_two_steps(root: Path) -> None:
    mesh = CheckpointMesh(tp_rank=dist.get_rank(), tp_size=2, group=dist.group.WORLD)
    for step in (5, 6):
        shards = [TensorShard(name, tensor.chunk(2)[mesh.tp_rank], 0) for name, tensor in whole(step).items()]
        save_checkpoint(root, step, shards, {"step": step, "config": {"seed": [step] * 40}}, mesh, keep_last=2)


def any_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def flip_bits(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    content = bytearray(path.read_bytes())
    for position in draw.sample(range(len(content)), draw.choice((1, 1, 1, 2, 8))):
        content[position] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def empty(folder: Path, draw: random.Random) -> None:
    any_file(folder, draw).write_bytes(b"")


def append(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 50)))


def blank_a_block(folder: Path, draw: random.Random) -> None:
    """As after a power cut: a stretch of zeros in the middle."""
    path = any_file(folder, draw)
    content = bytearray(path.read_bytes())
    first = draw.randrange(len(content) - 1)
    last = min(len(content), first + draw.randint(1, 512))
    path.write_bytes(content[:first] + bytes(0 if byte else 1 for byte in content[first:last]) + content[last:])


def remove(folder: Path, draw: random.Random) -> None:
    any_file(folder, draw).unlink()


def rename(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.rename(path.with_name(f"other{path.suffix}"))


def add(folder: Path, draw: random.Random) -> None:
    """A further tensor file, which torch's reader would take: another's, empty, or hidden."""
    name = draw.choice(("extra.safetensors", "shard-00003-of-00002.safetensors", ".hidden.safetensors"))
    content = draw.choice((b"", sorted(folder.glob("*.safetensors"))[0].read_bytes()))
    (folder / name).write_bytes(content)


def swap(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def take_from_another_step(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    shutil.copy(complete_folder(folder.parent, 5) / path.name, path)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip_bits, flip_bits, flip_bits, flip_bits, truncate, truncate, empty, append, blank_a_block),
    *(remove, rename, add, swap, take_from_another_step),
)


def test_each_of_200_random_damages_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "checkpoints"
    run_ranks(save_two_steps, 2, root)
    older, newest = complete_folder(root, 5), complete_folder(root, 6)
    kept = shutil.copytree(newest, tmp_path / "kept")
    assert len(list(newest.glob("*.safetensors"))) == 2
    assert find_latest(root) == newest
    for seed in range(NUM_DAMAGES):
        draw = random.Random(seed)
        damage = DAMAGES[seed % len(DAMAGES)]
        damage(newest, draw)
        told = f"damage {seed}, {damage.__name__}"
        target = [TensorShard(name, torch.full((ROWS, COLUMNS), 7.0), None) for name in whole(6)]
        with pytest.raises(DamagedCheckpointError) as raised:
            load_checkpoint(newest, target, ALONE)
        assert raised.value.problems, told
        assert all(bool((shard.local == 7).all()) for shard in target), told
        with pytest.raises(DamagedCheckpointError):
            next(read_tensors(newest))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find_latest(root) == older, told
        assert f"passing over the checkpoint {newest} is damaged" in caplog.text, told
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    assert load_checkpoint(newest, target, ALONE)["step"] == 6
    assert all(torch.equal(shard.local, whole(6)[shard.name]) for shard in target)
