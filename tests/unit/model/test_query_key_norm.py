"""Norms of queries and keys: over each head, between projection and xPos, values left alone."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LENGTH, MICRO, step_batches, tiny_run

GROUPS, HEADS, K = 2, 4, 8
EPSILON = 1e-2


def inputs_of_attention(run: RunConfig) -> dict[str, Tensor]:
    """Return what the last layer's projection gives, what its core attention takes, and the norms' weights."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    attention = chunk.decoder.layers[-1].self_attention
    seen: dict[str, Tensor] = {}
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not None:
            for kind, parameter in getattr(attention, name).named_parameters():
                nn.init.normal_(parameter)
                seen[f"{name}.{kind}"] = parameter.detach()

    def keep_projection(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        seen["projected"] = output[0].detach()

    def keep_heads(_module: nn.Module, inputs: tuple[Tensor, ...], *_: Any) -> None:
        seen.update(zip(("query", "key", "value"), (tensor.detach() for tensor in inputs), strict=False))

    attention.linear_qkv.register_forward_hook(keep_projection)
    attention.core_attention.register_forward_pre_hook(keep_heads)
    chunk(step_batches(0, "t")[0])
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("normalized", [True, False])
def test_each_head_s_queries_and_keys_are_normalized_before_xpos(normalized: bool) -> None:
    changes = {
        "model__decoder__query_key_norm": normalized,
        "model__decoder__num_query_groups": GROUPS,
        "model__decoder__layer_norm_epsilon": EPSILON,
    }
    (seen,) = run_ranks(inputs_of_attention, 1, tiny_run(**changes))
    heads = seen["projected"].view(LENGTH, MICRO, GROUPS, HEADS // GROUPS + 2, K)
    query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
    if normalized:
        norm = partial(F.layer_norm, normalized_shape=(K,), eps=EPSILON)
        query = norm(query, weight=seen["q_layernorm.weight"], bias=seen["q_layernorm.bias"])
        key = norm(key, weight=seen["k_layernorm.weight"], bias=seen["k_layernorm.bias"])
    for name, expected in (("query", query), ("key", key), ("value", value)):
        torch.testing.assert_close(seen[name], expected, atol=1e-6, rtol=1e-6)
