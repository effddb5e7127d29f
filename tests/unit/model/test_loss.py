"""The loss over a vocabulary with padding that tensor parallelism cuts anywhere: torch's cross-entropy, always."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import ParallelConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model import loss
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.loss import linear_cross_entropy
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import VOCAB, as_seen_by, step_batches, tiny_run
from tests.unit.model.tensor_sizes import TensorSizes

N, D, PADDED = 11, 6, 32
REAL_SIZES = (32, 31, 20, 16, 7, 1)
"""Over four ranks of eight ids: no padding, an odd vocabulary, and one, two and three shards of padding alone."""

CHUNKS = (1, 4, 100)
"""Targets of a chunk: each alone, a last chunk that is shorter, all at once."""

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}

Result = dict[tuple[torch.dtype, int, int], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Sum of losses, losses [N], gradients of hidden states [N, D] and weight [V, D], by dtype, real ids and chunk."""


def case(dtype: torch.dtype, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [N, D], a weight [V, D] whose padding would have the highest logits, and labels [N]."""
    draw = torch.Generator().manual_seed(vocab_size)
    hidden, weight = torch.rand(N, D, generator=draw), torch.randn(PADDED, D, generator=draw)
    weight[vocab_size:] = 100.0
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, vocab_size, (N,), generator=draw)


@cache
def expected(dtype: torch.dtype, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return torch's sum of losses over the real ids, losses and gradients, of thrice the sum."""
    hidden, weight, labels = case(dtype, vocab_size)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.t())[:, :vocab_size].to(torch.promote_types(dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, reduction="none")
    (3 * losses.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses.sum().detach(), losses.detach(), hidden.grad, weight.grad


@cache
def results_of_ranks(tp_size: int) -> list[Result]:
    ranks: list[Result] = run_ranks(results_of_rank, tp_size, tp_size)
    return ranks


def results_of_rank(tp_size: int) -> Result:
    topology = build_topology(ParallelConfig(tensor_parallel_size=tp_size), torch.device("cpu"))
    results = {}
    for dtype, vocab_size, chunk in product(TOLERANCES, REAL_SIZES, CHUNKS):
        hidden, weight, labels = case(dtype, vocab_size)
        share = weight.chunk(tp_size)[topology.tp_rank].clone().requires_grad_()
        hidden.requires_grad_()
        num_real = min(max(vocab_size - topology.tp_rank * len(share), 0), len(share))
        with chunks_of(chunk, len(share)):
            total, losses = linear_cross_entropy(hidden, share, labels, num_real, topology.tp_group)
        (3 * total).backward()
        assert hidden.grad is not None
        assert share.grad is not None
        results[dtype, vocab_size, chunk] = total.detach(), losses, hidden.grad, share.grad
    return results


@contextmanager
def chunks_of(targets: int, share: int) -> Iterator[None]:
    """Let a chunk be so many targets, for chunks of the real size would need millions of logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", targets * share)
        yield


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", REAL_SIZES)
def test_losses_and_gradients_are_those_of_cross_entropy(vocab_size: int, tp_size: int, dtype: torch.dtype) -> None:
    close = partial(torch.testing.assert_close, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    total, losses, hidden, weight = expected(dtype, vocab_size)
    for chunk in CHUNKS:
        ranks = [results[dtype, vocab_size, chunk] for results in results_of_ranks(tp_size)]
        for rank_total, rank_losses, _, _ in ranks:
            assert rank_losses.dtype == torch.promote_types(dtype, torch.float32)
            close(rank_total, total)
            close(rank_losses, losses)
        close(torch.stack([rank_hidden for _, _, rank_hidden, _ in ranks]).sum(0), hidden)
        whole = torch.cat([rank_weight for *_, rank_weight in ranks])
        close(whole, weight)
        assert not whole[vocab_size:].any()


@pytest.mark.distributed
def test_a_batch_without_targets_has_a_loss_and_gradients_of_zero() -> None:
    (gradients,) = run_ranks(gradients_without_targets, 1, tiny_run())
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def gradients_without_targets(run: RunConfig) -> list[Tensor]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    batch = step_batches(0, "m")[0]
    losses = chunk(replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
    losses.total.backward()
    assert losses.total == 0.0
    assert not losses.each_BT.any()
    return [one.parameter.grad for one in named_parameters(chunk) if one.parameter.grad is not None]


@pytest.mark.distributed
def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    product = 2 * N * D * PADDED
    assert run_ranks(operations_of_forward, 1) == [[3 * product, 2 * product, 2 * product, product, product]]


def operations_of_forward() -> list[int]:
    """Return what the losses take by the wishes for gradients of hidden states and weight, and without autograd."""
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    wishes = [(True, True, True), (True, False, True), (False, True, True), (False, False, True), (True, True, False)]
    counts = []
    for wants_hidden, wants_weight, has_autograd in wishes:
        hidden, weight, labels = case(torch.bfloat16, PADDED)  # products in fp32 join a sum: torch counts no addmm_
        hidden.requires_grad_(wants_hidden)
        weight.requires_grad_(wants_weight)
        with torch.set_grad_enabled(has_autograd), FlopCounterMode(display=False) as counter:
            total, _ = linear_cross_entropy(hidden, weight, labels, PADDED, topology.tp_group)
        counts.append(counter.get_total_flops())
        assert total.requires_grad == (has_autograd and (wants_hidden or wants_weight))
    return counts


@pytest.mark.distributed
def test_a_gradient_in_bf16_is_summed_in_fp32() -> None:
    """Over 600 chunks: a sum in bf16 would stop at 256, where it is too coarse to see another chunk."""
    (gradient,) = run_ranks(gradient_of_many_chunks, 1)
    expected = torch.full((PADDED, 1), 600 / PADDED)
    expected[0] -= 600
    torch.testing.assert_close(gradient.float(), expected, atol=0.0, rtol=2**-8)


@pytest.mark.distributed
def test_no_tensor_holds_the_logits_of_all_targets() -> None:
    (sizes,) = run_ranks(sizes_of_tensors, 1)
    assert max(sizes) == 600 < 600 * PADDED


def sizes_of_tensors() -> list[int]:
    """Return how many elements everything has that the losses and gradients of 600 chunks are computed with."""
    with TensorSizes() as seen:
        gradient_of_many_chunks()
    return seen.sizes


def gradient_of_many_chunks() -> Tensor:
    """Return a weight's gradient where every id is as likely and the first is always right."""
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    weight = torch.zeros(PADDED, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(600, dtype=torch.int64)
    with chunks_of(1, PADDED):
        total, _ = linear_cross_entropy(
            torch.ones_like(labels[:, None], dtype=weight.dtype), weight, labels, PADDED, topology.tp_group
        )
    total.backward()
    assert weight.grad is not None
    return weight.grad


ODD_VOCABULARY = {"model__decoder__vocab_size": VOCAB - 1}
"""89 ids in 96 rows: neither two nor four ranks divide it."""


def model_losses(run: RunConfig) -> tuple[Tensor, Tensor]:
    """Return the losses [B, T] and the logits [B, T, V] of the whole model."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    batch = as_seen_by(topology, odd_batch())
    return chunk(batch).each_BT, chunk.logits(batch).detach()


def odd_batch() -> MultimodalBatch:
    batch = step_batches(0, "m")[0]
    batch.input_ids.clamp_(max=VOCAB - 2)
    batch.labels.clamp_(max=VOCAB - 2)
    return batch


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_ranks_do_not_divide_has_one_loss(tied: bool) -> None:
    changes: dict[str, Any] = ODD_VOCABULARY | {"model__decoder__tie_embeddings": tied}
    losses, logits = run_ranks(model_losses, 1, tiny_run(**changes))[0]
    assert logits.shape[-1] == VOCAB - 1
    batch = odd_batch()
    over_real_ids = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none") * batch.loss_mask
    torch.testing.assert_close(losses, over_real_ids, atol=2e-6, rtol=0.0)
    assert losses.max() > 1.0
    for tp_size in (2, 4):
        run = tiny_run(**changes, parallel__tensor_parallel_size=tp_size)
        for rank_losses, rank_logits in run_ranks(model_losses, tp_size, run):
            torch.testing.assert_close(rank_losses, losses, atol=2e-6, rtol=0.0)
            torch.testing.assert_close(rank_logits, logits, atol=2e-6, rtol=0.0)
