"""Attention in blocks of queries with dropout: the plain computation with the same elements dropped."""

import pytest
import torch
from torch import Tensor

from megatron_kosmos.model.blocked_attention import BLOCK, causal_attention_with_dropout
from megatron_kosmos.model.dropout import draw_kept, scale_of_kept
from tests.unit.model.tensor_sizes import TensorSizes

SEED, B, K = 5, 2, 8
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3.2e-2}
"""Measured in bf16: 2.5e-2 at most, and 3.9e-2 with probabilities in bf16, which are to be in fp32."""
LENGTHS = (1, 7, BLOCK, 2 * BLOCK + 9)


def case(length: int, num_heads: int, num_groups: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = [(B, heads, length, K) for heads in (num_heads, num_groups, num_groups, num_heads)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def kept_elements(length: int, num_heads: int, num_groups: int, p: float) -> Tensor:
    """Return the scaled dropout [B, H, T, T] that a call after `torch.manual_seed(SEED)` draws, block by block."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    kept = torch.zeros(B, num_heads, length, length, dtype=torch.float64)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        block = torch.empty(B, num_groups, num_heads // num_groups, stop - start, stop)
        kept[:, :, start:stop, :stop] = draw_kept(block, p, generator).flatten(1, 2)
    return kept * scale_of_kept(p)


def plain(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / K**0.5
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(is_later, -torch.inf).softmax(-1) * kept) @ v


@pytest.mark.parametrize("dtype, bound", BOUNDS.items(), ids=str)
@pytest.mark.parametrize("num_heads, num_groups", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_context_and_gradients_are_the_plain_ones(
    length: int, num_heads: int, num_groups: int, dtype: torch.dtype, bound: float
) -> None:
    *inputs, direction = case(length, num_heads, num_groups, dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = plain(exact[0], exact[1], exact[2], kept_elements(length, num_heads, num_groups, 0.3))
    expected.backward(direction.double())
    mine = [x.requires_grad_() for x in inputs]
    torch.manual_seed(SEED)
    context = causal_attention_with_dropout(mine[0], mine[1], mine[2], 0.3)
    assert context.dtype == dtype
    context.backward(direction)
    for actual, wanted in zip((context, *(x.grad for x in mine)), (expected, *(x.grad for x in exact)), strict=True):
        assert actual is not None
        assert wanted is not None
        difference = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
        assert difference < bound


def test_other_calls_drop_other_elements_and_equal_streams_the_same() -> None:
    q, k, v, _ = case(20, 2, 2, torch.float32)
    torch.manual_seed(1)
    first, second = (causal_attention_with_dropout(q, k, v, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(causal_attention_with_dropout(q, k, v, 0.5), first)


def test_no_tensor_holds_all_queries_by_all_keys() -> None:
    length = 4 * BLOCK
    q, k, v, direction = case(length, 2, 2, torch.float32)
    with TensorSizes() as seen:
        causal_attention_with_dropout(q.requires_grad_(), k, v, 0.1).backward(direction)
    assert max(seen.sizes) == B * 2 * BLOCK * length
