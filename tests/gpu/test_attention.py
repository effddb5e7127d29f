"""Every attention kernel on CUDA in bf16, against torch's in fp32: values, gradients, documents, dropout.

Shape letters: T tokens, B batch, H heads, G query groups, K head size.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_kosmos.batch import row_starts
from megatron_kosmos.engine.builder import derive_transformer_config
from megatron_kosmos.model.attention import CausalAttention
from megatron_kosmos.model.documents import Segments, segments_of
from megatron_kosmos.model.kernels import LIBRARIES, Kernels, Obstacle, choose_kernels, resolve
from megatron_kosmos.model.xpos import XPos
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import step_batches, tiny_run

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
T, B, H, K = 256, 2, 4, 64
KERNELS = {
    "sdpa": Kernels("sdpa"),
    "flash": Kernels("flash"),
    "unfused": Kernels("unfused"),
    "unfused_apex": Kernels("unfused", softmax="apex"),
}
STARTS = (0, 100, 104, 256, 300, 511, 512)
"""Borders of segments in two rows of T."""


@dataclass(frozen=True)
class Case:
    """One attention."""

    kernels: Kernels
    num_groups: int = H
    dropout: float = 0.0
    masks_documents: bool = False
    dtype: torch.dtype = torch.bfloat16

    def attention(self) -> CausalAttention:
        """Return it on CUDA, its random stream set."""
        run = tiny_run(
            training__precision="bf16" if self.dtype == torch.bfloat16 else "fp32",
            model__decoder__width=H * K,
            model__decoder__num_heads=H,
            model__decoder__num_query_groups=self.num_groups,
            model__decoder__attention_dropout=self.dropout,
        )
        seed_microbatch(1, 0, 0, 0, build_topology(run.parallel, CUDA))
        layer: dict[str, Any] = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
        transformer = derive_transformer_config(run, self.kernels)
        return CausalAttention(transformer, XPos(K, T), **layer).to(CUDA)

    def segments(self) -> Segments | None:
        """Return where attention stays within, None for the rows."""
        starts = torch.tensor(STARTS, dtype=torch.int32) if self.masks_documents else row_starts(B, T)
        batch = step_batches(0, "t")[0]
        assert len(batch.input_ids) == B
        return segments_of(replace(batch, document_starts=starts), CUDA)


def attend(case: Case, heads: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Return the output and the gradients of query, key and value, in fp32."""
    inputs = [tensor.to(CUDA, case.dtype, copy=True).requires_grad_() for tensor in heads]
    output = case.attention()(*inputs, attention_mask=None, packed_seq_params=case.segments())
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(CUDA, case.dtype)
    output.backward(direction)
    return [output.detach().float().cpu(), *(tensor.grad.float().cpu() for tensor in inputs if tensor.grad is not None)]


def random_heads(num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(T, B, count, K, generator=generator) for count in (H, num_groups, num_groups))
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def compare_with_fp32(case: Case) -> None:
    heads = random_heads(case.num_groups)
    plain = Case(Kernels(), case.num_groups, masks_documents=case.masks_documents, dtype=torch.float32)
    for name, actual, expected in zip(
        ("output", "dq", "dk", "dv"), attend(case, heads), attend(plain, heads), strict=True
    ):
        error = ((actual - expected).norm() / expected.norm()).item()
        assert error < 1e-2, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("masks_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("num_groups", [H, 2, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_fp32(kernel: str, num_groups: int, masks_documents: bool) -> None:
    run_ranks(compare_with_fp32, 1, Case(KERNELS[kernel], num_groups, masks_documents=masks_documents))


def compare_documents_with_slices() -> None:
    """flash-attn's borders against torch's attention on each segment alone."""
    heads = random_heads(H)
    borders = attend(Case(Kernels("flash"), masks_documents=True), heads)[0]
    slices = attend(Case(Kernels("sdpa"), masks_documents=True), heads)[0]
    assert ((borders - slices).norm() / slices.norm()).item() < 5e-3
    rows = attend(Case(Kernels("flash")), heads)[0]
    assert torch.equal(rows[: STARTS[1], 0], borders[: STARTS[1], 0]), "the first segment sees what its row shows"
    assert (rows[STARTS[1] :, 0] - borders[STARTS[1] :, 0]).abs().max() > 0.1


def test_borders_of_documents_are_slices() -> None:
    run_ranks(compare_documents_with_slices, 1)


def count_dropped(kernels: Kernels) -> None:
    """With equal scores and values of one, an output is the share of what was kept, over 1 - p."""
    query = torch.zeros(T, B, H, K, dtype=torch.bfloat16, device=CUDA)
    value = torch.ones_like(query)
    attention = Case(kernels, dropout=0.1).attention()
    outputs = [attention(query, query, value, attention_mask=None).float() for _ in range(2)]
    late = outputs[0][T // 2 :].view(T // 2, B, H, K)[..., 0]  # rows of at least T / 2 scores
    assert abs(late.mean().item() - 1.0) < 5e-3
    # Var = p / (1 - p) / n for n scores.
    counts = torch.arange(T // 2 + 1, T + 1, device=CUDA)[:, None, None]
    spread = ((late - 1.0) ** 2 * counts).mean().item()
    assert abs(spread / (0.1 / 0.9) - 1.0) < 0.2
    assert not torch.equal(late[:, :, 0], late[:, :, 1]), "heads must differ"
    assert not torch.equal(*outputs), "the stream must go on"
    again = Case(kernels, dropout=0.1).attention()
    assert torch.equal(again(query, query, value, attention_mask=None).float(), outputs[0]), "the seed must fix it"
    undropped = again.eval()(query, query, value, attention_mask=None)
    torch.testing.assert_close(undropped, value.flatten(2), atol=1e-2, rtol=0.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_keeps_what_it_should(kernel: str) -> None:
    run_ranks(count_dropped, 1, KERNELS[kernel])


def choose_here() -> None:
    run = tiny_run(training__precision="bf16")
    build_topology(run.parallel, CUDA)
    assert choose_kernels(run, CUDA) == resolve(run, dict.fromkeys(LIBRARIES, Obstacle.NONE))


def test_every_kernel_is_found() -> None:
    run_ranks(choose_here, 1)
