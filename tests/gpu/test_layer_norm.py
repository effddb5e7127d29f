"""apex's and TransformerEngine's LayerNorm on CUDA, against torch's in fp32."""

import pytest
import torch
from torch import Tensor

from megatron_kosmos.engine.builder import derive_transformer_config
from megatron_kosmos.model.kernels import Kernels
from megatron_kosmos.model.layer_norm import ResidualLayerNorm
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_run

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def normalize(kernel: str, width: int, precision: str) -> dict[str, Tensor]:
    """Return output and gradients of one LayerNorm with weights that are not those it starts from."""
    run = tiny_run(training__precision=precision, model__decoder__width=width)
    build_topology(run.parallel, CUDA)
    transformer = derive_transformer_config(run, Kernels(layer_norm=kernel))
    norm = ResidualLayerNorm(transformer, width, run.model.decoder.layer_norm_epsilon).to(CUDA)
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in norm.parameters():
            assert parameter.dtype == transformer.params_dtype
            assert parameter.sequence_parallel is False  # type: ignore[attr-defined]
            parameter.copy_(torch.randn(width, generator=generator).bfloat16())
    x = torch.randn(33, 2, width, generator=generator).mul(3).add(1).bfloat16()
    x = x.to(CUDA, transformer.params_dtype).requires_grad_()
    output = norm(x)
    output.backward(torch.randn(output.shape, generator=generator).to(CUDA, output.dtype))
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()} | {"input": x.grad}
    return {"output": output.detach().float().cpu()} | {
        name: gradient.float().cpu() for name, gradient in gradients.items() if gradient is not None
    }


def compare(kernel: str, width: int, precision: str) -> None:
    actual, expected = normalize(kernel, width, precision), normalize("torch", width, "fp32")
    assert actual.keys() == expected.keys() == {"output", "input", "weight", "bias"}
    bound = 2e-2 if precision == "bf16" else 1e-5
    for name, value in expected.items():
        error = ((actual[name] - value).norm() / value.norm()).item()
        assert error < bound, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [96, 2048], ids=["any_width", "persistent"])
@pytest.mark.parametrize("kernel", ["torch", "apex", "te"])
def test_values_and_gradients_are_those_of_fp32(kernel: str, width: int, precision: str) -> None:
    run_ranks(compare, 1, kernel, width, precision)
