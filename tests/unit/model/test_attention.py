"""Causal attention, and heads that share their keys and values."""

import pytest
import torch
from torch import Tensor

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, build_stage, derive_transformer_config
from megatron_kosmos.model.attention import CausalAttention
from megatron_kosmos.model.initialization import initialize, local_part
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.model.xpos import XPos
from megatron_kosmos.parallel.cpu_backend import install_cpu_backend
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import Topology, build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

T, B, H, K = 7, 2, 4, 6


@pytest.fixture(autouse=True)
def random_streams() -> None:
    """What the step does before each microbatch."""
    install_cpu_backend()
    seed_microbatch(1, 0, 0, 0, Topology(0, 1, 0, 1, 0, 1, virtual_size=1, device=torch.device("cpu")))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attention = CausalAttention(derive_transformer_config(tiny_run()), XPos(K, 16))
    return attention(query, key, value, attention_mask=None)


def random_heads(num_heads: int, seed: int) -> Tensor:
    return torch.randn(T, B, num_heads, K, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_query_groups_are_heads_with_common_keys_and_values(num_groups: int) -> None:
    query, key, value = (random_heads(count, seed) for seed, count in enumerate((H, num_groups, num_groups)))
    expanded = [tensor.repeat_interleave(H // num_groups, dim=2) for tensor in (key, value)]
    torch.testing.assert_close(attend(query, key, value), attend(query, *expanded), atol=1e-6, rtol=1e-5)


def test_a_position_reads_itself_and_what_came_before() -> None:
    query, key, value = (random_heads(H, seed) for seed in range(3))
    attend(query, key, value)[3].sum().backward()
    for tensor in (key, value):
        assert tensor.grad is not None
        assert (tensor.grad[:4].abs().amax((1, 2, 3)) > 0).all()
        assert torch.equal(tensor.grad[4:], torch.zeros_like(tensor.grad[4:]))


def expand_heads(fused: Tensor, num_groups: int, head_size: int) -> Tensor:
    """Give every query head its own copy of its group's key and value, in megatron-core's order of rows."""
    groups = fused.unflatten(0, (num_groups, -1, head_size))
    queries, keys, values = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    own = torch.stack((queries, keys.expand_as(queries), values.expand_as(queries)), dim=2)
    return own.flatten(0, 3)


def whole_weights(run: RunConfig) -> dict[str, Tensor]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    return {named.name: named.parameter.detach() for named in named_parameters(chunk)}


def logits_with(run: RunConfig, weights: dict[str, Tensor]) -> Tensor:
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    with torch.no_grad():
        for named in named_parameters(chunk):
            named.parameter.copy_(local_part(weights[named.name], named.shard_dim, chunk))
    (batch,) = rank_batches(0, "m", topology)
    return chunk.eval().logits(batch).detach()


@pytest.mark.distributed
@pytest.mark.parametrize("num_groups, tp_size", [(1, 1), (2, 1), (2, 2)])
def test_a_model_with_query_groups_is_the_model_with_all_heads(num_groups: int, tp_size: int) -> None:
    grouped = tiny_run(model__decoder__num_query_groups=num_groups, parallel__tensor_parallel_size=tp_size)
    one_rank = tiny_run(model__decoder__num_query_groups=num_groups)
    decoder = grouped.model.decoder
    weights = run_ranks(whole_weights, 1, one_rank)[0]
    expanded = {
        name: expand_heads(tensor, num_groups, decoder.head_size) if ".linear_qkv." in name else tensor
        for name, tensor in weights.items()
    }
    expected = run_ranks(logits_with, 1, tiny_run(), expanded)[0]
    assert expected.std() > 0.1
    for actual in run_ranks(logits_with, tp_size, grouped, weights):
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0.0)


def dtypes_of_tables(run: RunConfig) -> set[torch.dtype]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    tables = [buffer for chunk in stage.chunks for name, buffer in chunk.named_buffers() if ".xpos." in name]
    assert len(tables) == 4, "all layers share one set"
    return {table.dtype for table in tables}


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_tables_of_positions_stay_in_fp32_in_a_bf16_run(zero_stage: int) -> None:
    """At 2,048 tokens their scale reaches 17; in bf16 they are wrong by half. DeepSpeed casts models as it likes."""
    run = tiny_run(training__precision="bf16", parallel__zero_stage=zero_stage)
    assert run_ranks(dtypes_of_tables, 1, run) == [{torch.float32}]
