"""Causal attention with dropout in blocks of queries: no matrix of all queries by all keys is ever in memory.

torch's attention on the CPU leaves its flash kernel for the sake of dropout and holds [B, H, T, T] several times. Here
a block of queries attends to the keys up to its last one; the backward pass computes the block's probabilities again
from the logarithms of their sums, and draws its dropout again from the seed (as in FlashAttention, arXiv 2205.14135,
algorithms 2 and 4).

Shape letters: B batch, T tokens, H query heads, G key heads, R = H / G, K head size, Q queries of a block, S keys that
the block sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_kosmos.model.dropout import draw_kept, scale_of_kept

BLOCK = 128
"""Queries of a block."""


def causal_attention_with_dropout(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, p: float) -> Tensor:
    """Return dropout(softmax(q k' / sqrt(K))) v, [B, H, T, K], where token t sees tokens 0 to t.

    Draws one seed from torch's stream. Products are in the inputs' dtype, probabilities in fp32 at least.
    """
    seed = int(torch.randint(2**62, ()))
    context: Tensor = _BlockedAttention.apply(q_BHTK, k_BGTK, v_BGTK, p, seed)
    return context


class _BlockedAttention(torch.autograd.Function):
    """Saves what comes in, what goes out, and a number a query."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, p: float, seed: int) -> Tensor:
        q_BGRTK = _grouped(q_BHTK, k_BGTK)
        context_BGRTK = torch.empty_like(q_BGRTK)
        log_sums_BGRT = q_BGRTK.new_empty(q_BGRTK.shape[:-1], dtype=_precise(q_BHTK.dtype))
        for queries, scores_BGRQS, kept_BGRQS in _blocks(q_BGRTK, k_BGTK, p, seed):
            log_sums_BGRQ = scores_BGRQS.logsumexp(-1)
            log_sums_BGRT[..., queries] = log_sums_BGRQ
            dropped = _probabilities(scores_BGRQS, log_sums_BGRQ).mul_(kept_BGRQS).mul_(scale_of_kept(p))
            context_BGRTK[..., queries, :] = _weighted(dropped.to(v_BGTK.dtype), v_BGTK[:, :, : queries.stop])
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, context_BGRTK, log_sums_BGRT)
        ctx.p, ctx.seed = p, seed
        return context_BGRTK.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_context_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BGTK, v_BGTK, context_BGRTK, log_sums_BGRT = ctx.saved_tensors
        q_BGRTK, grad_context_BGRTK = _grouped(q_BHTK, k_BGTK), _grouped(grad_context_BHTK, k_BGTK)
        precise, scale = log_sums_BGRT.dtype, scale_of_kept(ctx.p)
        grad_q_BGRTK = torch.empty_like(q_BGRTK)
        grad_k_BGTK, grad_v_BGTK = (torch.zeros_like(x, dtype=precise) for x in (k_BGTK, v_BGTK))
        dots_BGRT1 = (grad_context_BGRTK.to(precise) * context_BGRTK).sum(-1, keepdim=True)
        for queries, scores_BGRQS, mask_BGRQS in _blocks(q_BGRTK, k_BGTK, ctx.p, ctx.seed):
            seen = slice(queries.stop)
            grad_BGRQK = grad_context_BGRTK[..., queries, :]
            probabilities = _probabilities(scores_BGRQS, log_sums_BGRT[..., queries])
            kept_BGRQS = mask_BGRQS.mul_(scale)
            dropped = (probabilities * kept_BGRQS).to(v_BGTK.dtype)
            grad_v_BGTK[:, :, seen] += _summed_over_queries(dropped, grad_BGRQK)
            grad_dropped = _weighted(grad_BGRQK, v_BGTK[:, :, seen].transpose(-1, -2)).to(precise)
            grad_scores = grad_dropped.mul_(kept_BGRQS).sub_(dots_BGRT1[..., queries, :]).mul_(probabilities)
            grad_scores = grad_scores.mul_(q_BHTK.shape[-1] ** -0.5).to(q_BHTK.dtype)
            grad_q_BGRTK[..., queries, :] = _weighted(grad_scores, k_BGTK[:, :, seen])
            grad_k_BGTK[:, :, seen] += _summed_over_queries(grad_scores, q_BGRTK[..., queries, :])
        return grad_q_BGRTK.flatten(1, 2), grad_k_BGTK.to(k_BGTK.dtype), grad_v_BGTK.to(v_BGTK.dtype), None, None


def _blocks(q_BGRTK: Tensor, k_BGTK: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each block's queries, scores [B, G, R, Q, S] and what dropout keeps of them; S ends with the queries."""
    generator = torch.Generator(q_BGRTK.device).manual_seed(seed)
    length, precise = q_BGRTK.shape[-2], _precise(q_BGRTK.dtype)
    for start in range(0, length, BLOCK):
        queries = slice(start, min(start + BLOCK, length))
        scores = _weighted(q_BGRTK[..., queries, :], k_BGTK[:, :, : queries.stop].transpose(-1, -2)).to(precise)
        scores *= q_BGRTK.shape[-1] ** -0.5
        size = queries.stop - start
        is_later_QQ = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., start:].masked_fill_(is_later_QQ, -torch.inf)
        yield queries, scores, draw_kept(scores, p, generator)


def _probabilities(scores_BGRQS: Tensor, log_sums_BGRQ: Tensor) -> Tensor:
    """Return the softmax, which overwrites the scores."""
    return scores_BGRQS.sub_(log_sums_BGRQ[..., None]).exp_()


def _weighted(left_BGRQX: Tensor, right_BGXY: Tensor) -> Tensor:
    """Return left @ right [B, G, R, Q, Y]: one product a key head for all its query heads."""
    return (left_BGRQX.flatten(2, 3) @ right_BGXY).unflatten(2, left_BGRQX.shape[2:4])


def _summed_over_queries(left_BGRQX: Tensor, right_BGRQY: Tensor) -> Tensor:
    """Return the sum over R and Q of left' right, [B, G, X, Y]."""
    return left_BGRQX.flatten(2, 3).transpose(-1, -2) @ right_BGRQY.flatten(2, 3)


def _grouped(x_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
    return x_BHTK.unflatten(1, (k_BGTK.shape[1], -1))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
