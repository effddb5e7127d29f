"""The output projection and its cross-entropy, without logits that are ever whole in memory.

Tensor parallelism cuts the vocabulary, which has padding behind its last id. The tokens that are targets go through in
chunks: logits of a chunk, its losses and, while they are at hand, its gradients. So no logits are kept for the backward
pass, nor computed twice, and positions that are no target cost nothing (as in Liger Kernel, arXiv 2410.10989, section
3.2, here with a cut vocabulary).

Shape letters: B batch, T tokens, D decoder width, N targets, C targets of a chunk, V this rank's share of the padded
vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_kosmos.config import DecoderConfig

CHUNK_ELEMENTS = 2**24
"""Logits of a chunk: 64 MiB in fp32, 262 targets of a vocabulary of 64,000; large enough for fast matrix products."""


class TokenLosses(NamedTuple):
    """What the last chunk of the model returns of a batch; alike on all tensor-parallel ranks."""

    total: Tensor
    """Sum of the targets' cross-entropies in nats, a scalar in fp32; the one that has a gradient."""
    each_BT: Tensor
    """Every position's cross-entropy [B, T] in nats, fp32; zero where there is no target."""


class OutputLayer(ColumnParallelLinear):
    """Projection of hidden states to the vocabulary, and the loss on it."""

    def __init__(self, decoder: DecoderConfig, config: TransformerConfig, owns_weight: bool) -> None:
        """Without a weight of its own it is given the embedding's with every call."""
        super().__init__(
            decoder.width,
            decoder.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=not owns_weight,
        )
        share = self.output_size_per_partition
        self.num_real = min(max(decoder.vocab_size - dist.get_rank(self.tp_group) * share, 0), share)
        """How many of this rank's ids exist; the rest is padding."""

    def forward(
        self,
        hidden_TBD: Tensor,
        weight: Tensor | None,
        targets: tuple[Tensor, Tensor] | None = None,
        columns: slice = slice(None),
    ) -> Tensor | TokenLosses:
        """Return the `TokenLosses` of `targets`, labels [B, T] and their mask; without, logits [T, B, V] of `columns`.

        Logits are of this rank's ids. `weight` [V, D] stands for the layer's own where embeddings are tied. Under
        sequence parallelism `hidden_TBD` has this rank's share of T. Forward: gather of T under sequence parallelism;
        all-reduces of each chunk's maximum, and of its sums of exponentials and target logits, over the
        tensor-parallel group. Backward: reduce-scatter of the hidden states' gradient over T, or its all-reduce.
        """
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden_TBD = gather_from_sequence_parallel_region(hidden_TBD)
        else:
            hidden_TBD = copy_to_tensor_model_parallel_region(hidden_TBD)
        if targets is None:
            return F.linear(hidden_TBD[columns], weight)
        labels_TB, mask_TB = (x.transpose(0, 1) for x in targets)
        at = mask_TB.nonzero(as_tuple=True)
        total, losses_N = linear_cross_entropy(hidden_TBD[at], weight, labels_TB[at], self.num_real, self.tp_group)
        losses_TB = losses_N.new_zeros(mask_TB.shape)
        losses_TB[at] = losses_N
        return TokenLosses(total, losses_TB.transpose(0, 1))


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, num_real: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies of softmax(hidden @ weight.T), fp32, and each of them [N].

    Only the sum has a gradient, once. labels_N count over the whole vocabulary, of which `weight_VD` is the share of
    this rank in `group`, its first `num_real` rows real. Matrix products are in the weights' dtype, all else in fp32 at
    least.
    """
    total, losses_N = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, num_real, group, torch.is_grad_enabled()
    )
    return total, losses_N


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the sum are computed with the losses, and scaled when backward comes."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - what autograd hands on
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        num_real: int,
        group: dist.ProcessGroup,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        share, precise = len(weight_VD), torch.promote_types(weight_VD.dtype, torch.float32)
        wants_hidden, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=precise) if wants_weight else None
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=precise)
        local_labels_N = labels_N - dist.get_rank(group) * share
        for rows in _chunks(len(hidden_ND), share):
            hidden_CD, labels_C = hidden_ND[rows], local_labels_N[rows]
            logits_CV = F.linear(hidden_CD, weight_VD).to(precise)
            losses_N[rows], softmax_CV, is_here_C1 = _cross_entropy(logits_CV, labels_C, num_real, group)
            if not (wants_hidden or wants_weight):
                continue
            grad_logits_CV = softmax_CV.scatter_add_(1, labels_C.clamp(0, share - 1)[:, None], -is_here_C1.to(precise))
            grad_logits_CV = grad_logits_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                torch.mm(grad_logits_CV, weight_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_logits_CV.t(), hidden_CD)
        ctx.gradients = grad_hidden_ND, grad_weight_VD
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.gradients
        del ctx.gradients
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.mul_(grad_total),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad_total).to(ctx.weight_dtype),
            *[None] * 4,
        )


def _chunks(num_targets: int, share: int) -> list[slice]:
    """Return equal slices, but for the last, of at most CHUNK_ELEMENTS logits each."""
    size = max(1, CHUNK_ELEMENTS // share)
    return [slice(start, start + size) for start in range(0, num_targets, size)]


def _cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, num_real: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [C], the softmax [C, V], which overwrites the logits, and whether a label is this rank's [C, 1]."""
    share = logits_CV.shape[1]
    logits_CV[:, num_real:] = -torch.inf
    maximum_C1 = logits_CV.amax(1, keepdim=True)
    is_alone = dist.get_world_size(group) == 1
    if not is_alone:
        dist.all_reduce(maximum_C1, op=dist.ReduceOp.MAX, group=group)
    is_here_C1 = ((labels_C >= 0) & (labels_C < share))[:, None]
    logits_CV.sub_(maximum_C1)
    target_C1 = logits_CV.gather(1, labels_C.clamp(0, share - 1)[:, None]).masked_fill_(~is_here_C1, 0.0)
    exponentials_CV = logits_CV.exp_()
    sums_2C1 = torch.stack([exponentials_CV.sum(1, keepdim=True), target_C1])
    if not is_alone:
        dist.all_reduce(sums_2C1, group=group)
    sum_C1, target_C1 = sums_2C1
    return (sum_C1.log() - target_C1).squeeze(1), exponentials_CV.div_(sum_C1), is_here_C1


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add left @ right to a sum that is as precise or more."""
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD.add_(left_VC @ right_CD)
