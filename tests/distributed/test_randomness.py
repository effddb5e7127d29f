"""Dropout in real training steps: each place and time draws its own masks, and where ranks must agree they do."""

import hashlib
from collections import defaultdict
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.model.attention import CausalAttention
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LENGTH, MICRO, as_seen_by, step_batches, tiny_run

pytestmark = pytest.mark.distributed

NUM_STEPS, NUM_MICROBATCHES = 2, 2
DROPOUT = {"model__decoder__dropout": 0.1, "model__decoder__attention_dropout": 0.1}
SHARDED = "model-parallel-rng"

Place = tuple[int, int, int, int, int]
"""Step, microbatch, data rank, chunk, tensor rank."""


def dropout_run(**changes: Any) -> RunConfig:
    return tiny_run(**DROPOUT, **changes, optimizer__learning_rate=1e-20, optimizer__weight_decay=0.0)


def stream_states(run: RunConfig) -> dict[Place, tuple[str, str]]:
    """Train, and return digests of the default and the sharded stream at the start of each chunk's forward pass.

    Every microbatch has the same tokens, so nothing but the place and the time can make a difference.
    """
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    states: dict[Place, tuple[str, str]] = {}
    num_passes: dict[int, int] = defaultdict(int)

    def note(chunk: KosmosModel, _: object) -> None:
        index = chunk.chunk.index
        step, microbatch = divmod(num_passes[index], NUM_MICROBATCHES)
        num_passes[index] += 1
        sharded = get_cuda_rng_tracker().get_states()[SHARDED]
        place = step, microbatch, topology.dp_rank, index, topology.tp_rank
        states[place] = digest(torch.get_rng_state()), digest(sharded)

    for chunk in stage.chunks:
        chunk.register_forward_pre_hook(note)
    runner = StepRunner(run, stage, topology)
    for step in range(NUM_STEPS):
        runner.train(step, [as_seen_by(topology, step_batches(0, "m")[0])] * NUM_MICROBATCHES)
    return states


def digest(state: Tensor) -> str:
    return hashlib.sha256(state.numpy().tobytes()).hexdigest()


def test_every_place_and_time_has_streams_of_its_own() -> None:
    """Over 2 steps, 2 microbatches, 2 data ranks, 4 chunks on 2 stages and 2 tensor ranks."""
    run = dropout_run(
        parallel__tensor_parallel_size=2,
        parallel__pipeline_parallel_size=2,
        parallel__virtual_pipeline_parallel_size=2,
    )
    states = {place: state for rank in run_ranks(stream_states, 8, run) for place, state in rank.items()}
    assert len(states) == NUM_STEPS * NUM_MICROBATCHES * 2 * 4 * 2
    sharded = {sharded for _, sharded in states.values()}
    assert len(sharded) == len(states), "tensor ranks must draw different masks for what they share out"
    default = {default for default, _ in states.values()}
    assert len(default) == len(states) // 2, "tensor ranks must draw the same masks for what they hold alike"
    assert not default & sharded
    for place, state in states.items():
        assert state[0] == states[(*place[:4], 1 - place[4])][0]


def dropped(run: RunConfig) -> tuple[int, int, list[Tensor], list[Tensor]]:
    """Return data and tensor rank, and what the embedding and the last layer's attention put out, microbatch by
    microbatch over two steps: the same tokens each time, with weights that don't move."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    (chunk,) = stage.chunks
    embedded: list[Tensor] = []
    attended: list[Tensor] = []
    chunk.embedding.register_forward_hook(lambda *call: embedded.append(call[2].detach()))
    attentions = [module for module in chunk.modules() if isinstance(module, CausalAttention)]
    make_heads_equal(attentions[0])
    attentions[0].register_forward_hook(lambda *call: attended.append(call[2].detach()))
    runner = StepRunner(run, stage, topology)
    for step in range(NUM_STEPS):
        runner.train(step, step_batches(0, "t") * NUM_MICROBATCHES)
    return topology.dp_rank, topology.tp_rank, embedded, attended


def make_heads_equal(attention: nn.Module) -> None:
    """Let the first layer's attention see ones everywhere, so that its heads differ by their dropout alone."""
    attention.register_forward_pre_hook(
        lambda _, inputs: (*(torch.ones_like(part) for part in inputs[:3]), *inputs[3:])
    )


def test_embeddings_are_dropped_alike_on_tensor_ranks_and_differently_elsewhere() -> None:
    ranks = run_ranks(dropped, 4, dropout_run(parallel__tensor_parallel_size=2))
    masks = defaultdict(list)
    for dp_rank, _, embedded, _ in ranks:
        for number, hidden in enumerate(embedded):
            assert hidden.shape == (LENGTH, MICRO, 32)
            assert 0.05 < (hidden == 0).float().mean() < 0.15
            masks[dp_rank, number].append(hidden == 0)
    assert len(masks) == 2 * NUM_STEPS * NUM_MICROBATCHES
    for first, second in masks.values():
        assert torch.equal(first, second)
    assert count_distinct([first for first, _ in masks.values()]) == len(masks)


def test_under_sequence_parallelism_tensor_ranks_drop_their_tokens_differently() -> None:
    run = dropout_run(parallel__tensor_parallel_size=2, parallel__sequence_parallel=True)
    masks = [hidden == 0 for _, _, embedded, _ in run_ranks(dropped, 4, run) for hidden in embedded]
    assert all(mask.shape == (LENGTH // 2, MICRO, 32) for mask in masks)
    assert count_distinct(masks) == len(masks) == 4 * NUM_STEPS * NUM_MICROBATCHES


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_attention_of_each_head_is_dropped_differently(sequence_parallel: bool) -> None:
    """The heads are shared out over the tensor ranks in both cases; here they would be equal without dropout."""
    run = dropout_run(parallel__tensor_parallel_size=2, parallel__sequence_parallel=sequence_parallel)
    heads = [
        head
        for _, _, _, attended in run_ranks(dropped, 4, run)
        for context in attended
        for head in context.unflatten(-1, (2, -1)).unbind(-2)
    ]
    assert count_distinct(heads) == len(heads) == 4 * NUM_STEPS * NUM_MICROBATCHES * 2


def test_the_same_run_drops_the_same() -> None:
    run = dropout_run(parallel__tensor_parallel_size=2)
    for first, second in zip(run_ranks(dropped, 2, run), run_ranks(dropped, 2, run), strict=True):
        for one, other in zip((*first[2], *first[3]), (*second[2], *second[3]), strict=True):
            assert torch.equal(one, other)


def test_another_seed_drops_otherwise() -> None:
    first, second = (run_ranks(dropped, 1, dropout_run(training__seed=seed))[0][3][0] for seed in (1, 2))
    assert not torch.equal(first, second)


def count_distinct(tensors: list[Tensor]) -> int:
    return len({tensor.numpy().tobytes() for tensor in tensors})
