"""The formulas of memory.py against what DeepSpeed holds while the tiny model trains."""

import gc
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, build_stage, derive_transformer_config
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.memory import RankMemory, memory_formula, rank_memory, snapshot_bytes
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.model.names import NamedParameter, named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

Storages = dict[int, int]
"""Bytes by address."""


def storages(tensors: Iterable[Tensor]) -> Storages:
    parts = [tensor.untyped_storage() for tensor in tensors]
    return {part.data_ptr(): part.nbytes() for part in parts if part.nbytes()}


def living_storages() -> Storages:
    """Every tensor that Python can reach and that is not frozen in its collector, and its gradient."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return storages((*tensors, *gradients))


def planned_and_held(run: RunConfig) -> tuple[RankMemory, RankMemory]:
    """What each rank does: plan its memory, then train up to the update and count it."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    chunks = build_chunks(run, derive_transformer_config(run), topology)
    planned = rank_memory((named for chunk in chunks for named in named_parameters(chunk)), run, topology.dp_size)
    del chunks
    batches = rank_batches(0, "tttt", topology)
    gc.freeze()  # What lives now is not counted, and the forked parent's pages stay untouched.
    stage, _ = build_stage(run, topology)
    held: list[RankMemory] = []
    update = stage.optimizer.engine.step

    def count_then_update() -> None:
        held.append(count(stage))
        update()

    stage.optimizer.engine.step = count_then_update
    StepRunner(run, stage, topology).train(0, batches)
    return planned, held[0]


def count(stage: Stage) -> RankMemory:
    weights = storages(part for named in stage.named for part in parts_of_weight(named.parameter))
    adamw = stage.optimizer.adamw
    optimizer = storages(tensor for flat, state in adamw.state.items() for tensor in (flat, *state.values()))
    buffers = storages(buffer for chunk in stage.chunks for buffer in chunk.buffers())
    known = weights | optimizer | buffers
    gradients = {address: size for address, size in living_storages().items() if address not in known}
    return RankMemory(
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(size for address, size in optimizer.items() if address not in weights),
    )


def parts_of_weight(parameter: nn.Parameter) -> list[Tensor]:
    """The weight, and under ZeRO 3 this rank's share of it."""
    return [parameter.data, *([parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else [])]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "zero_stage, precision",
    [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")],
)
def test_deepspeed_holds_what_the_formula_says(zero_stage: int, precision: str) -> None:
    """Within alignment, AdamW's counters and the few kilobytes that a step leaves behind."""
    run = tiny_run(parallel__zero_stage=zero_stage, training__precision=precision)
    for planned, held in run_ranks(planned_and_held, 2, run):
        assert held.weights == pytest.approx(planned.weights, rel=1e-3)
        assert held.optimizer == pytest.approx(planned.optimizer, rel=2e-3)
        assert planned.gradients <= held.gradients <= planned.gradients + 20_000


def copied_bytes(run: RunConfig) -> tuple[int, int]:
    """Host memory of this rank's copy of a checkpoint, as planned and as allocated."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    chunks = build_chunks(run, derive_transformer_config(run), topology)
    named = [named for chunk in chunks for named in named_parameters(chunk)]
    planned = snapshot_bytes(named, topology.tp_size, topology.dp_size)
    stage, _ = build_stage(run, topology)
    store = CheckpointStore(Path("unused"), topology, keep_last=1)
    return planned, store.saver(stage).background.num_bytes


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes", [{"zero_stage": 1}, {"zero_stage": 3}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
)
def test_the_copy_of_a_checkpoint_takes_what_is_planned(changes: dict[str, int]) -> None:
    changes = {f"parallel__{name}": value for name, value in changes.items()}
    run = tiny_run(**changes, model__decoder__tie_embeddings=True)
    planned, allocated = zip(*run_ranks(copied_bytes, 2, run), strict=True)
    assert sum(allocated) == pytest.approx(sum(planned), rel=0.02)
    assert allocated == pytest.approx(planned, rel=0.05)


def named(name: str, *shape: int, requires_grad: bool = True) -> NamedParameter:
    parameter = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=requires_grad)
    return NamedParameter(name, parameter, shard_dim=None, is_tied_copy=False)


MATRIX, VECTOR = named("output_layer.weight", 500, 1000), named("decoder.final_layernorm.weight", 700)
FROZEN = named("resampler.projection.weight", 300, 1000, requires_grad=False)
EMBEDDING = named("embedding.word_embeddings.weight", 100, 1000)


@pytest.mark.parametrize(
    "zero_stage, precision, weights, gradients, optimizer",
    [
        (0, "fp32", 4 * 800_700, 4 * 500_700, 8 * 500_700),
        (1, "fp32", 4 * 800_700, 4 * 500_700, 12 * 125_175),
        (1, "bf16", 2 * 800_700, 4 * 500_700, 12 * 125_175),
        (2, "bf16", 2 * 800_700, 4 * 125_175, 12 * 125_175),
        (3, "bf16", 2 * (200_175 + 700), 4 * 125_175, 12 * 125_175),
    ],
)
def test_bytes_of_a_rank(zero_stage: int, precision: str, weights: int, gradients: int, optimizer: int) -> None:
    """On four data ranks; ZeRO 3 leaves the vector whole, and cuts what is frozen too."""
    run = tiny_run(parallel__zero_stage=zero_stage, training__precision=precision)
    memory = rank_memory((MATRIX, VECTOR, FROZEN), run, dp_size=4)
    assert memory == RankMemory(weights, gradients, optimizer)
    assert memory.total == weights + gradients + optimizer


@pytest.mark.parametrize("zero_stage, master, data_ranks", [(0, 0, 1), (1, 4, 4)])
def test_moments_of_8_bits_take_two_bytes_and_their_scales(zero_stage: int, master: int, data_ranks: int) -> None:
    run = tiny_run(parallel__zero_stage=zero_stage, training__precision="fp32", optimizer__kind="adamw_8bit")
    scales = 2 * 4 * 500_000 / 256
    expected = (master * 600_700 + 2 * 500_000 + scales + 8 * 100_700) / data_ranks
    memory = rank_memory((MATRIX, VECTOR, FROZEN, EMBEDDING), run, dp_size=4)
    assert memory.optimizer == math.ceil(expected)


def test_the_formula_is_told() -> None:
    assert memory_formula(tiny_run(training__precision="bf16"), 16).startswith(
        "bytes: weights 2 N, gradients 4 T, optimizer 12 T / 16\n"
    )
    eight_bit = tiny_run(training__precision="bf16", optimizer__kind="adamw_8bit")
    assert "optimizer (6.03125 (T - E) + 12 E) / 16\n" in memory_formula(eight_bit, 16)
    assert "gradients 4 T / 8" in memory_formula(tiny_run(parallel__zero_stage=2), 8)
