"""The sub-LN over a width that tensor parallelism cuts: torch's LayerNorm, forward and backward, at every size."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kosmos.config import ParallelConfig
from megatron_kosmos.model.sub_layer_norm import ShardedLayerNorm
from megatron_kosmos.parallel.topology import Topology, build_topology
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

T, B, WIDTH, EPSILON = 3, 2, 64, 1e-5


class Result(NamedTuple):
    output: Tensor
    input_gradient: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor


class Case(NamedTuple):
    """Activations [T, B, WIDTH] whose mean and spread differ between the shards."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    direction: Tensor


def make_case(mean: float, dtype: torch.dtype = torch.float32) -> Case:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(T, B, WIDTH, generator=draw) * torch.linspace(0.5, 2.0, WIDTH) + torch.linspace(-1, 1, WIDTH) + mean
    others = (torch.randn(shape, generator=draw) for shape in ((WIDTH,), (WIDTH,), (T, B, WIDTH)))
    return Case(*(tensor.to(dtype) for tensor in (x, *others)))


def reference(case: Case) -> Result:
    """torch's LayerNorm of the whole width, in fp64."""
    x, weight, bias = (tensor.to(torch.float64, copy=True).requires_grad_() for tensor in case[:3])
    output = F.layer_norm(x, (WIDTH,), weight, bias, EPSILON)
    (output * case.direction.double()).sum().backward()
    gradients = [tensor.grad for tensor in (x, weight, bias)]
    assert all(gradient is not None for gradient in gradients)
    return Result(output.detach(), *gradients)  # type: ignore[arg-type]


CASES = {
    "fp64": (make_case(0.0, torch.float64), 1e-13),
    "fp32": (make_case(0.0), 1e-6),
    "fp32_far_from_zero": (make_case(1e3), 3e-4),
    "bf16": (make_case(0.0, torch.bfloat16), 2e-2),
    "bf16_far_from_zero": (make_case(50.0, torch.bfloat16), 4e-2),
}
"""Inputs, and the largest error relative to the largest value."""


def sharded_cases(tp_size: int) -> list[Result]:
    topology = build_topology(ParallelConfig(tensor_parallel_size=tp_size), torch.device("cpu"))
    return [sharded(case, topology) for case, _ in CASES.values()]


def sharded(case: Case, topology: Topology) -> Result:
    """What this rank computes of its columns."""
    x, weight, bias, direction = (tensor.chunk(topology.tp_size, -1)[topology.tp_rank].clone() for tensor in case)
    norm = ShardedLayerNorm(WIDTH, topology.tp_group, EPSILON, case.x.dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    x.requires_grad_()
    output = norm(x)
    assert output.dtype == case.x.dtype
    (output * direction).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return Result(output.detach(), x.grad, norm.weight.grad, norm.bias.grad)


@cache
def whole(tp_size: int) -> dict[str, Result]:
    """What all ranks together compute, by case."""
    ranks: list[list[Result]] = run_ranks(sharded_cases, tp_size, tp_size)
    joined = (
        Result(*(torch.cat(parts, -1) for parts in zip(*shards, strict=True))) for shards in zip(*ranks, strict=True)
    )
    return dict(zip(CASES, joined, strict=True))


def assert_close(actual: Result, expected: Result, tolerance: float) -> None:
    for name, one, other in zip(Result._fields, actual, expected, strict=True):
        error = ((one.double() - other).abs().max() / other.abs().max()).item()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_layer_norm_of_the_full_width(tp_size: int, name: str) -> None:
    case, tolerance = CASES[name]
    assert_close(whole(tp_size)[name], reference(case), tolerance)


def test_control_what_cancels_far_from_zero() -> None:
    """E[x²] - mean², a one-pass variance, fails where the two-pass one passes with room to spare."""
    case = make_case(mean=1e3)
    x = case.x
    variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    one_pass = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance.clamp(min=0) + EPSILON) * case.weight + case.bias
    expected = reference(case).output
    assert (one_pass - expected).abs().max() / expected.abs().max() > 3e-3


def test_control_a_norm_of_each_shard_is_another_model() -> None:
    case = make_case(mean=0.0)
    parts = [F.layer_norm(part, (WIDTH // 2,), eps=EPSILON) for part in case.x.chunk(2, -1)]
    separate = torch.cat(parts, -1) * case.weight + case.bias
    assert (separate - reference(case).output).abs().max() > 0.1
