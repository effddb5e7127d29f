"""The loss over a vocabulary with padding that tensor parallelism cuts anywhere: torch's cross-entropy, always."""

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import ParallelConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.loss import mask_padded_vocabulary, token_losses
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import VOCAB, as_seen_by, step_batches, tiny_run

B, T, PADDED = 2, 5, 32
REAL_SIZES = (32, 31, 20, 16, 7, 1)
"""Over four ranks of eight ids: no padding, an odd vocabulary, and one, two and three shards of padding alone."""


TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def logits_and_labels(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [T, B, padded] that are highest in the padding, labels [B, T] and a mask [B, T]."""
    draw = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(T, B, PADDED, generator=draw)
    logits[..., vocab_size:] += 100.0
    return logits, torch.randint(0, vocab_size, (B, T), generator=draw), torch.rand(B, T, generator=draw) < 0.6


def expected(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return torch's losses [B, T] over the real ids, zero where masked, and the logits' gradient."""
    logits, labels, mask = logits_and_labels(vocab_size)
    logits = logits.to(dtype).requires_grad_()
    real = logits[..., :vocab_size].permute(1, 2, 0).float()
    losses = F.cross_entropy(real, labels, reduction="none") * mask
    losses.sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


@cache
def losses_of_ranks(tp_size: int) -> list[dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]]]:
    ranks: list[dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]]] = run_ranks(losses_of_rank, tp_size, tp_size)
    return ranks


def losses_of_rank(tp_size: int) -> dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]]:
    """Return this rank's losses, and the gradient of its logits, by dtype and number of real ids."""
    topology = build_topology(ParallelConfig(tensor_parallel_size=tp_size), torch.device("cpu"))
    results = {}
    for dtype, vocab_size in product(TOLERANCES, REAL_SIZES):
        logits, labels, mask = logits_and_labels(vocab_size)
        share = logits.chunk(tp_size, -1)[topology.tp_rank].to(dtype, copy=True).requires_grad_()
        losses = token_losses(mask_padded_vocabulary(share.clone(), vocab_size, topology.tp_rank), labels, mask)
        losses.sum().backward()
        assert share.grad is not None
        results[dtype, vocab_size] = losses.detach(), share.grad
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", REAL_SIZES)
def test_losses_and_gradients_are_those_of_cross_entropy(vocab_size: int, tp_size: int, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    losses, gradient = expected(vocab_size, dtype)
    ranks = [results[dtype, vocab_size] for results in losses_of_ranks(tp_size)]
    for rank_losses, _ in ranks:
        assert rank_losses.dtype == torch.float32
        torch.testing.assert_close(rank_losses, losses, atol=tolerance, rtol=tolerance)
    whole = torch.cat([rank_gradient for _, rank_gradient in ranks], dim=-1)
    torch.testing.assert_close(whole, gradient, atol=tolerance, rtol=tolerance)
    assert torch.equal(whole[..., vocab_size:], torch.zeros(T, B, PADDED - vocab_size, dtype=dtype))


@pytest.mark.parametrize("tp_rank, num_real", [(0, 8), (1, 2), (2, 0), (3, 0)])
def test_columns_without_an_id_get_the_lowest_value(tp_rank: int, num_real: int) -> None:
    logits = torch.ones(T, B, 8)
    masked = mask_padded_vocabulary(logits, 10, tp_rank)
    assert torch.equal(masked[..., :num_real], logits[..., :num_real])
    assert (masked[..., num_real:] == torch.finfo(torch.float32).min).all()


ODD_VOCABULARY = {"model__decoder__vocab_size": VOCAB - 1}
"""89 ids in 96 rows: neither two nor four ranks divide it."""


def model_losses(run: RunConfig) -> tuple[Tensor, Tensor]:
    """Return the losses [B, T] and the logits [B, T, V] of the whole model."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    batch = as_seen_by(topology, odd_batch())
    return chunk(batch).detach(), chunk.logits(batch).detach()


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
