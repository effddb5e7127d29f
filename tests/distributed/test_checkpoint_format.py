"""One checkpoint for every layout: what ranks save together, ranks of another layout load, or fail together."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.load import find_latest, load_checkpoint, read_tensor_names, read_tensors
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.tiny import tiny_run

pytestmark = pytest.mark.distributed


class Layout(NamedTuple):
    tp: int
    pp: int
    dp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


class Whole(NamedTuple):
    """A whole tensor, the dim that tensor parallelism cuts, and the quarters of the model that hold it."""

    value: Tensor
    shard_dim: int | None
    quarters: tuple[int, ...]


def whole_tensors() -> dict[str, Whole]:
    """Tensors of every kind that training has, none constant."""
    draw = torch.Generator().manual_seed(5)
    wholes = {
        "model/embedding.word_embeddings.weight": Whole(torch.randn(16, 6, generator=draw), 0, (0, 3)),  # tied
        "model/resampler.frame_embedding": Whole(torch.randn(5, generator=draw), None, (0,)),
        "model/decoder.final_layernorm.bias": Whole(torch.randn(6, generator=draw), None, (3,)),
    }
    for layer in range(4):
        name = f"decoder.layers.{layer}"
        sub_ln = torch.randn(8, generator=draw)
        rows, columns = torch.randn(8, 6, generator=draw), torch.randn(6, 8, generator=draw)
        wholes |= {
            f"model/{name}.mlp.linear_fc1.weight": Whole(rows, 0, (layer,)),
            f"model/{name}.mlp.linear_fc2.weight": Whole(columns, 1, (layer,)),
            f"model/{name}.mlp.linear_fc2.norm.weight": Whole(sub_ln, 0, (layer,)),
            f"optimizer/{name}.mlp.linear_fc2.weight/exp_avg": Whole(columns.bfloat16() + layer, 1, (layer,)),
            f"optimizer/{name}.mlp.linear_fc2.weight/step": Whole(torch.tensor(2**53 + layer), None, (layer,)),
        }
    return wholes


def place(layout: Layout) -> tuple[CheckpointMesh, int, int]:
    """Return the mesh, the stage and the data-parallel rank; tp is fastest, then dp, then pp, as in megatron-core."""
    rank = dist.get_rank()
    mesh = CheckpointMesh(tp_rank=rank % layout.tp, tp_size=layout.tp, group=dist.group.WORLD)
    return mesh, rank // (layout.tp * layout.dp), rank // layout.tp % layout.dp


def shards_of(wholes: dict[str, Whole], layout: Layout, *, saves: bool) -> list[TensorShard]:
    """Return this rank's parts. A tied copy on the last stage is loaded, not saved."""
    mesh, stage, _ = place(layout)
    parts = []
    for name, (value, shard_dim, quarters) in wholes.items():
        held_by = [quarter * layout.pp // 4 for quarter in quarters]
        if stage in (held_by[:1] if saves else held_by):
            part = value if shard_dim is None else value.chunk(layout.tp, shard_dim)[mesh.tp_rank]
            parts.append(TensorShard(name, part.clone(memory_format=torch.contiguous_format), shard_dim))
    return parts


def save_under(layout: Layout, root: Path, step: int) -> None:
    shards = shards_of(whole_tensors(), layout, saves=True)
    assert save_checkpoint(root, step, shards, {"step": step}, place(layout)[0], keep_last=2).is_dir()


def load_under(layouts: list[Layout], folder: Path) -> list[set[str]]:
    """Load under each layout in turn, compare every bit, and return the names that this rank held."""
    names = []
    for layout in layouts:
        wanted = shards_of(whole_tensors(), layout, saves=False)
        blank = [TensorShard(shard.name, torch.full_like(shard.local, 3), shard.shard_dim) for shard in wanted]
        assert load_checkpoint(folder, blank, place(layout)[0]) == {"step": 7}
        for got, want in zip(blank, wanted, strict=True):
            assert torch.equal(got.local, want.local), (layout, got.name)
        names.append({shard.name for shard in wanted})
    return names


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 2, 2), Layout(2, 2, 1)], ids=str)
def test_what_one_layout_saves_every_layout_loads(layout: Layout, tmp_path: Path) -> None:
    run_ranks(save_under, layout.world_size, layout, tmp_path, 7)
    folder = find_latest(tmp_path)
    assert folder == tmp_path / "step_00000007"
    wholes = whole_tensors()
    assert run_ranks(load_under, 1, [Layout(1, 1, 1)], folder) == [[wholes.keys()]]
    names_of_ranks = run_ranks(
        load_under, 4, [Layout(2, 1, 2), Layout(4, 1, 1), Layout(2, 2, 1), Layout(1, 4, 1)], folder
    )
    for names_under_layout in zip(*names_of_ranks, strict=True):
        assert set().union(*names_under_layout) == wholes.keys()

    assert read_tensor_names(folder) == {name: tuple(whole.value.shape) for name, whole in wholes.items()}
    read = dict(read_tensors(folder))
    assert read.keys() == wholes.keys()
    assert all(torch.equal(read[name], whole.value) for name, whole in wholes.items())


def test_replicas_are_written_once_and_every_rank_writes_a_share(tmp_path: Path) -> None:
    layout = Layout(1, 1, 4)
    run_ranks(save_under, 4, layout, tmp_path, 1)
    sizes = [path.stat().st_size for path in (tmp_path / "step_00000001").glob("*.safetensors")]
    data = sum(whole.value.nbytes for whole in whole_tensors().values())
    assert len(sizes) == 4
    assert data < sum(sizes) < data + 4 * 1500  # a header lists up to 6 names
    assert {path.name[:11] for path in (tmp_path / "step_00000001").iterdir()} >= {
        f"shard-0000{i}" for i in (1, 2, 3, 4)
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as raised:
        function()
    return str(raised.value)


def save_where_rank_1_has_no_room(layout: Layout, root: Path) -> str:
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    message = message_of(lambda: save_under(layout, root, 8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return message


def test_a_full_disk_on_one_rank_fails_all_and_leaves_the_previous(tmp_path: Path) -> None:
    layout = Layout(2, 2, 1)
    run_ranks(save_under, 4, layout, tmp_path, 7)
    messages = run_ranks(save_where_rank_1_has_no_room, 4, layout, tmp_path)
    assert messages == messages[:1] * 4
    assert f"saving {tmp_path}/step_00000008 failed on rank 1: " in messages[0]
    assert "File too large" in messages[0]
    assert names_in(tmp_path) == ["latest", "step_00000007"]
    assert find_latest(tmp_path) == tmp_path / "step_00000007"


def save_where_rank_3_dies(layout: Layout, root: Path) -> None:
    if dist.get_rank() == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process within write(2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    save_under(layout, root, 8)


def test_a_rank_that_dies_while_it_writes_leaves_the_previous(tmp_path: Path) -> None:
    layout = Layout(2, 1, 2)
    run_ranks(save_under, 4, layout, tmp_path, 7)
    with pytest.raises(RankFailure, match="rank 3 died"):
        run_ranks(save_where_rank_3_dies, 4, layout, tmp_path)
    assert names_in(tmp_path) == [".step_00000008.writing", "latest", "step_00000007"]
    assert find_latest(tmp_path) == tmp_path / "step_00000007"
    run_ranks(save_under, 4, layout, tmp_path, 8)
    assert names_in(tmp_path) == ["latest", "step_00000007", "step_00000008"]


def load_in_vain(layout: Layout, folder: Path) -> str:
    shards = shards_of(whole_tensors(), layout, saves=False)
    for shard in shards:
        shard.local.zero_()
    message = message_of(lambda: load_checkpoint(folder, shards, place(layout)[0]))
    assert not any(shard.local.any() for shard in shards)
    return message


def find_under(layout: Layout, root: Path) -> Path | None:
    return find_latest(root, place(layout)[0])


def test_damage_in_one_file_is_found_by_all_ranks_alike(tmp_path: Path) -> None:
    layout = Layout(2, 2, 1)
    for step in (6, 7):
        run_ranks(save_under, 4, layout, tmp_path, step)
    newest = tmp_path / "step_00000007"
    assert run_ranks(find_under, 4, layout, tmp_path) == [newest] * 4
    damaged = sorted(newest.glob("*.safetensors"))[2]
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 64
    damaged.write_bytes(content)
    (message, *others) = run_ranks(load_in_vain, 4, layout, newest)
    assert f"{damaged.name} has its size but not its sha256 checksum" in message
    assert others == [message] * 3
    assert run_ranks(find_under, 4, layout, tmp_path) == [tmp_path / "step_00000006"] * 4


def load_with_a_name_more_on_rank_1(layout: Layout, folder: Path) -> str:
    shards = [shard for shard in shards_of(whole_tensors(), layout, saves=False) if "final" not in shard.name]
    if dist.get_rank() == 1:
        shards.append(TensorShard("model/decoder.layers.9.mlp.linear_fc1.bias", torch.zeros(4), 0))
    return message_of(lambda: load_checkpoint(folder, shards, place(layout)[0]))


def test_a_misfit_on_one_rank_is_told_by_all(tmp_path: Path) -> None:
    layout = Layout(2, 2, 1)
    run_ranks(save_under, 4, layout, tmp_path, 7)
    messages = run_ranks(load_with_a_name_more_on_rank_1, 4, layout, tmp_path / "step_00000007")
    assert (
        messages
        == [
            f"the checkpoint {tmp_path}/step_00000007 does not fit this run:\n"
            "  - model/decoder.final_layernorm.bias [6] is in the checkpoint, but nothing asks for it\n"
            "  - model/decoder.layers.9.mlp.linear_fc1.bias [8] is missing from the checkpoint"
        ]
        * 4
    )


def save_a_part_only(root: Path) -> str:
    rank = dist.get_rank()
    mesh = CheckpointMesh(tp_rank=rank, tp_size=2, group=dist.group.WORLD)
    shards = [TensorShard("model/w", torch.ones(3, 2), shard_dim=0)] if rank == 0 else []
    return message_of(lambda: save_checkpoint(root, 1, shards, {}, mesh, keep_last=1))


def test_parts_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    (message, other) = run_ranks(save_a_part_only, 2, tmp_path)
    assert "model/w" in message
    assert "invalid fill" in message
    assert other == message
    assert list(tmp_path.iterdir()) == []


def draw(shard: TensorShard, mesh: CheckpointMesh) -> Tensor:
    """Return this rank's part of a random tensor that depends on the name alone."""
    whole = torch.randn(shard.global_shape(mesh), generator=torch.Generator().manual_seed(crc32(shard.name.encode())))
    return whole if shard.shard_dim is None else whole.chunk(mesh.tp_size, shard.shard_dim)[mesh.tp_rank]


def build_model(run: RunConfig) -> tuple[CheckpointMesh, list[TensorShard]]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    mesh = CheckpointMesh(topology.tp_rank, topology.tp_size, dist.group.WORLD)
    return mesh, [TensorShard(n.name, n.parameter.detach(), n.shard_dim) for n in named_parameters(chunk)]


def save_model(run: RunConfig, root: Path) -> None:
    mesh, shards = build_model(run)
    for shard in shards:
        shard.local.copy_(draw(shard, mesh))
    save_checkpoint(root, 1, shards, {}, mesh, keep_last=1)


def load_model(run: RunConfig, folder: Path) -> list[str]:
    mesh, shards = build_model(run)
    load_checkpoint(folder, shards, mesh)
    assert all(torch.equal(shard.local, draw(shard, mesh)) for shard in shards)
    return [shard.name for shard in shards if shard.shard_dim == 0 and shard.local.dim() == 1]


@pytest.mark.parametrize("saved_with, loaded_with", [(2, 1), (2, 2), (1, 4)])
def test_a_model_with_no_constant_weight_survives(saved_with: int, loaded_with: int, tmp_path: Path) -> None:
    run_ranks(save_model, saved_with, tiny_run(parallel__tensor_parallel_size=saved_with), tmp_path)
    run = tiny_run(parallel__tensor_parallel_size=loaded_with)
    (cut_vectors, *_) = run_ranks(load_model, loaded_with, run, tmp_path / "step_00000001")
    assert {
        f"decoder.layers.{layer}.{norm}.{kind}"
        for layer in range(4)
        for norm in ("self_attention.linear_proj.norm", "mlp.linear_fc2.norm")
        for kind in ("weight", "bias")
    } <= set(cut_vectors)
