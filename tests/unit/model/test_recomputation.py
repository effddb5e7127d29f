"""Recomputation above frozen weights: what trains gets gradients, what lies below it runs once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import step_batches, tiny_run

BELOW_DECODER = ["vision_tower.*", "resampler.*", "embedding.*"]


def train_once(run: RunConfig) -> tuple[list[int], dict[str, Tensor]]:
    """Return how often each decoder layer ran in a forward and backward pass, and the gradients that there are."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    calls = [0] * run.model.decoder.num_layers

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    layers: list[nn.Module] = list(chunk.decoder.layers)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(count(number))
    chunk.train()
    seed_microbatch(run.training.seed, 0, 0, 0, topology)
    chunk(step_batches(0, "m")[0]).total.backward()
    named = ((name, parameter.grad) for name, parameter in chunk.named_parameters())
    return calls, {name: gradient for name, gradient in named if gradient is not None}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "frozen, calls",
    [
        ([], [2, 2, 2, 2]),
        (BELOW_DECODER, [2, 2, 2, 2]),
        ([*BELOW_DECODER, "decoder.layers.[01].*"], [1, 1, 2, 2]),
        ([*BELOW_DECODER, "decoder.layers.[02].*"], [1, 2, 2, 2]),
        ([*BELOW_DECODER, "decoder.layers.*"], [1, 1, 1, 1]),
    ],
    ids=["nothing", "below_decoder", "first_layers", "in_between", "all_layers"],
)
def test_layers_below_the_lowest_trained_weight_run_once(frozen: list[str], calls: list[int]) -> None:
    changes: dict[str, Any] = {
        "optimizer__groups": [{"parameters": frozen, "frozen": True}] if frozen else [],
        "model__decoder__dropout": 0.1,
        "model__decoder__attention_dropout": 0.1,
    }
    ((counted, gradients),) = run_ranks(train_once, 1, tiny_run(**changes, training__recompute="full"))
    ((plain_calls, expected),) = run_ranks(train_once, 1, tiny_run(**changes))
    assert (counted, plain_calls) == (calls, [1, 1, 1, 1])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
