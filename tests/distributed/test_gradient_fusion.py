"""Weight gradients that a kernel adds to DeepSpeed's fp32 sums train as those that autograd hands over.

apex's CUDA kernel has a stand-in, which does its sum in torch and rounds as the plain path does; everything around it
is real. The kernel itself is tested in tests/gpu.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_kosmos.engine import builder
from megatron_kosmos.model.kernels import Kernels
from megatron_kosmos.optim import zero
from megatron_kosmos.optim.gradient_fusion import accumulate_inside_kernels
from tests.distributed.training import TrainingRecord, train_in_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_sp": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "dp2": (2, {}),
}


class StandInForTheKernel(ModuleType):
    """What megatron-core calls of apex's `fused_weight_gradient_mlp_cuda`."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__("fused_weight_gradient_mlp_cuda")
        self.factor = factor

    def wgrad_gemm_accum_fp32(self, inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add grad_output^T inputs [out, in] to `main_grad` in place."""
        assert main_grad.dtype == torch.float32
        main_grad.add_(grad_output.t().matmul(inputs), alpha=self.factor)


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has kernels add weight gradients from here on, with the stand-in for apex's."""

    def start(factor: float = 1.0) -> None:
        monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", StandInForTheKernel(factor), raising=False)
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
        monkeypatch.setattr(builder, "choose_kernels", lambda *_: Kernels(gradient_accumulation="apex"))

    return start


def train(layout: str, tied: bool = False, recompute: str = "none") -> TrainingRecord:
    world_size, parallel = LAYOUTS[layout]
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    return train_in_ranks(
        world_size,
        pattern="tm",
        num_steps=3,
        training__global_batch_size=4,
        model__decoder__num_layers=2,
        training__precision="bf16",
        training__recompute=recompute,
        model__decoder__tie_embeddings=tied,
        **changes,
    )


@cache
def plain(layout: str, tied: bool = False) -> TrainingRecord:
    return train(layout, tied)


@pytest.mark.parametrize(
    "layout, tied, recompute",
    [
        ("one", False, "full"),
        ("tp2_sp", False, "none"),
        ("pp2", True, "none"),
        ("one", True, "none"),
        ("dp2", False, "none"),
    ],
)
def test_gradients_and_weights_are_bitwise_those_of_the_plain_path(
    fuse: Callable[..., None], layout: str, tied: bool, recompute: str
) -> None:
    expected = plain(layout, tied)
    fuse()
    record = train(layout, tied, recompute)
    assert record.gradients.keys() == expected.gradients.keys()
    assert all(torch.equal(record.gradients[name], gradient) for name, gradient in expected.gradients.items())
    assert record.grad_norms == expected.grad_norms
    assert record.losses == expected.losses
    assert all(torch.equal(record.weights[name], weight) for name, weight in expected.weights.items())


def test_control_the_kernel_is_what_gradients_come_from(fuse: Callable[..., None]) -> None:
    expected = plain("one")
    fuse(factor=2.0)
    gradients = train("one").gradients
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(gradients[name], 2 * expected.gradients[name])
    bias = "decoder.layers.0.mlp.linear_fc1.bias"
    assert torch.equal(gradients[bias], expected.gradients[bias])


def test_control_gradients_that_deepspeed_does_not_know_of_are_missing_in_the_norm(
    fuse: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_bookkeeping(chunks: Any, optimizer: Any) -> None:
        clear = optimizer.clear_hp_grads
        accumulate_inside_kernels(chunks, optimizer)
        optimizer.clear_hp_grads = clear
        clear()

    expected = plain("one")
    fuse()
    monkeypatch.setattr(zero, "accumulate_inside_kernels", without_bookkeeping)
    assert train("one").grad_norms[0] < 0.9 * expected.grad_norms[0]
