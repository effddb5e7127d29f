"""Query-key norm, grouped and multi-query attention are those of transformers' models that have them."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_kosmos.config import RunConfig
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_run
from tests.parity.fidelity import Record
from tests.parity.oracles import gradients_of
from tests.parity.oracles_attention import attend, attention, attention_names
from tests.parity.ours import FP32, FP64, layout_changes, load, num_ranks, whole_gradients

pytestmark = [pytest.mark.parity, pytest.mark.distributed]

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "all heads": ("Llama", {}),
    "2 groups": ("Llama", {"num_query_groups": 2}),
    "multi-query": ("Llama", {"num_query_groups": 1}),
    "norm": ("Persimmon", {"query_key_norm": True}),
    "norm, 2 groups": ("Phi", {"query_key_norm": True, "num_query_groups": 2}),
    "norm, multi-query": ("Phi", {"query_key_norm": True, "num_query_groups": 1}),
}
BOUNDS = {FP32: 1e-6, FP64: 1e-10}
BATCH, LENGTH, SEED = 2, 11, 2


class Result(NamedTuple):
    """Output [B, T, D], and whole gradients by global name, that of the input among them."""

    output: Tensor
    gradients: dict[str, Tensor]


def run_config(variant: str, layout: str) -> RunConfig:
    decoder: dict[str, object] = {"num_layers": 1, "xpos": False, **VARIANTS[variant][1]}
    return tiny_run(**{f"model__decoder__{field}": value for field, value in decoder.items()}, **layout_changes(layout))


def hidden_and_direction(width: int, precision: str) -> tuple[Tensor, Tensor]:
    """Return an input [B, T, D], and the gradient of the output that backward starts from."""
    drawn = torch.randn(2, BATCH, LENGTH, width, generator=torch.Generator().manual_seed(4))
    hidden, direction = drawn.to(torch.float32 if precision == FP32 else torch.float64)
    return hidden.clone().requires_grad_(), direction


@cache
def reference(variant: str, precision: str) -> tuple[dict[str, Tensor], Result]:
    decoder = run_config(variant, "one rank").model.decoder
    oracle = attention(VARIANTS[variant][0], decoder, SEED).to(torch.float32 if precision == FP32 else torch.float64)
    hidden, direction = hidden_and_direction(decoder.width, precision)
    output = attend(oracle, hidden)
    output.backward(direction)
    assert hidden.grad is not None
    gradients = attention_names(gradients_of(oracle), decoder)
    return attention_names(oracle.state_dict(), decoder), Result(output.detach(), gradients | {"input": hidden.grad})


Case = tuple[RunConfig, dict[str, Tensor], str]


def compute_all(cases: dict[str, Case]) -> dict[str, Result]:
    """What each rank does: attend with its share of the heads, and gather the gradients."""
    topology = build_topology(next(iter(cases.values()))[0].parallel, torch.device("cpu"))
    results = {}
    for name, (run, weights, precision) in cases.items():
        chunk = load(run, weights, precision, topology)
        hidden, direction = hidden_and_direction(run.model.decoder.width, precision)
        output, bias = chunk.decoder.layers[0].self_attention(hidden.transpose(0, 1), attention_mask=None)
        assert bias is None
        output.transpose(0, 1).backward(direction)
        assert hidden.grad is not None
        gradients = whole_gradients(chunk, weights, topology) | {"input": hidden.grad}
        results[name] = Result(output.detach().transpose(0, 1), gradients)
    return results


@cache
def computed(layout: str) -> list[dict[str, Result]]:
    cases = {
        f"{variant} in {precision}": (run_config(variant, layout), reference(variant, precision)[0], precision)
        for variant in VARIANTS
        for precision in BOUNDS
    }
    return run_ranks(compute_all, num_ranks(layout), cases)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["one rank", "TP2"])
def test_outputs_and_gradients_are_those_of_transformers(
    fidelity: Record, layout: str, variant: str, precision: str
) -> None:
    _, expected = reference(variant, precision)
    for results in computed(layout):
        actual = results[f"{variant} in {precision}"]
        with_transformers = fidelity.of(f"transformers `{VARIANTS[variant][0]}Attention`", precision, layout)
        with_transformers.values("outputs", actual.output, expected.output, BOUNDS[precision])
        with_transformers.gradients(actual.gradients, expected.gradients, BOUNDS[precision])


def test_control_the_norms_and_the_groups_matter() -> None:
    outputs = [reference(variant, FP64)[1].output for variant in VARIANTS]
    for number, output in enumerate(outputs):
        for other in outputs[:number]:
            assert (output - other).abs().max() > 1e-2
