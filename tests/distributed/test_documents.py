"""Documents that share a row under `data.document_mask` are computed as if each were alone, under every layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, build_stage, derive_transformer_config
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LATENTS, LENGTH, SIDE, VOCAB, as_seen_by, tiny_run
from tests.distributed.training import record_gradients

pytestmark = pytest.mark.distributed

MICROBATCHES = (((7, 12, 5), (15, 6)), ((LENGTH,), (1, 10, 13)), ((9, 9), (3, 4, 17)), ((LENGTH,), (LENGTH,)))
"""Lengths of the documents in the rows of each microbatch; what is left of a row is padding."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "pp2_vpp2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}),
    "dp2_zero3": (2, {"zero_stage": 3}),
}


@dataclass(frozen=True)
class Document:
    """Tokens [T] of one document, and its picture [I, 3, S, S], I = 0 or 1, with the column of its first slot."""

    ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    images: Tensor
    columns: tuple[int, ...]


def document(length: int, seed: int) -> Document:
    """Return random tokens; a document that is long enough has a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, VOCAB, (length + 1,), generator=generator)
    mask = torch.rand(length, generator=generator) < 0.8
    columns = (2,) if length >= 9 else ()
    for column in columns:
        ids[column : column + LATENTS] = 0
        mask[column - 1 : column + LATENTS - 1] = False
    mask[-1] = False  # a document's last label would be the next one's first token
    images = torch.randn(len(columns), 3, SIDE, SIDE, generator=generator)
    return Document(ids[:-1], ids[1:], mask, images, columns)


def pack(rows: Sequence[Sequence[Document]], length: int) -> MultimodalBatch:
    """Return the rows under document masks; padding is a segment of its own."""
    num_rows = len(rows)
    ids, labels, positions = torch.zeros(3, num_rows, length, dtype=torch.int64)
    mask = torch.zeros(num_rows, length, dtype=torch.bool)
    starts, places = [0], []
    for number, row in enumerate(rows):
        column = 0
        for one in row:
            here = slice(column, column + len(one.ids))
            ids[number, here], labels[number, here], mask[number, here] = one.ids, one.labels, one.loss_mask
            positions[number, here] = torch.arange(len(one.ids))
            places += [(number, column + slot) for slot in one.columns]
            column = here.stop
            starts.append(number * length + column)
        if column < length:
            positions[number, column:] = torch.arange(length - column)
            starts.append((number + 1) * length)
    return MultimodalBatch(
        input_ids=ids,
        labels=labels,
        loss_mask=mask,
        position_ids=positions,
        document_starts=torch.tensor(starts, dtype=torch.int32),
        images=torch.cat([one.images for row in rows for one in row]),
        image_positions=torch.tensor(places, dtype=torch.int64).view(-1, 2),
        sources=torch.zeros(num_rows, dtype=torch.int64),
    )


@cache
def documents_of_step() -> list[list[list[Document]]]:
    return [
        [[document(length, 100 * m + 10 * r + d) for d, length in enumerate(lengths)] for r, lengths in enumerate(rows)]
        for m, rows in enumerate(MICROBATCHES)
    ]


def packed_step() -> list[MultimodalBatch]:
    return [pack(rows, LENGTH) for rows in documents_of_step()]


def build(run: RunConfig, dtype: torch.dtype) -> KosmosModel:
    """Build the whole model in one process, in a precision that the settings need not know."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    transformer = derive_transformer_config(run)
    transformer.params_dtype = dtype
    (chunk,) = build_chunks(run, transformer, topology)
    initialize(chunk, run.training.seed)
    seed_microbatch(run.training.seed, 0, 0, 0, topology)
    return chunk


def losses_and_gradients(
    run: RunConfig, batches: Sequence[MultimodalBatch], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return each batch's losses [B, T], and the gradients of their sum over the number of targets."""
    chunk = build(run, dtype)
    losses = [chunk(batch) for batch in batches]
    num_targets = sum(batch.num_target_tokens for batch in batches)
    (torch.stack([one.total for one in losses]).sum() / num_targets).backward()
    gradients = {one.name: one.parameter.grad for one in named_parameters(chunk) if one.parameter.grad is not None}
    return [one.each_BT for one in losses], gradients


@cache
def each_alone(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the losses [1, T] of every document in order, each a batch of its own length, and the gradients."""
    alone = [pack([[one]], len(one.ids)) for rows in documents_of_step() for row in rows for one in row]
    assert not any(batch.masks_documents for batch in alone)
    (result,) = run_ranks(losses_and_gradients, 1, tiny_run(**changes), alone, dtype)
    return result


def losses_by_document(losses: Sequence[Tensor]) -> list[Tensor]:
    """Cut the packed losses [B, T] back into documents [1, T]."""
    return [
        part[None]
        for batch, rows in zip(losses, documents_of_step(), strict=True)
        for row, documents in zip(batch, rows, strict=True)
        for part in row[: sum(len(one.ids) for one in documents)].split([len(one.ids) for one in documents])
    ]


def largest_difference(losses: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(losses, expected, strict=True))


def assert_same_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = (
            1e-8 if name.endswith("k_proj.bias") else relative * gradient.norm().item()
        )  # truly zero: a shift of keys
        difference = (gradients[name] - gradient).norm().item()
        assert difference <= bound, f"gradient of {name} differs by {difference:.2e}"


FP32, FP64 = torch.float32, torch.float64
LEARNED: dict[str, Any] = {"model__decoder__positions": "learned"}
CASES: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "xpos_fp32": ({}, FP32, 1e-5),
    "xpos_fp64": ({}, FP64, 1e-6),  # its tables are fp32, and documents stand elsewhere in them
    "learned_fp64": (LEARNED | {"model__decoder__xpos": False}, FP64, 1e-12),
    "learned_and_xpos_fp32": (LEARNED, FP32, 1e-5),
    "grouped_fp32": ({"model__decoder__num_query_groups": 2}, FP32, 1e-5),
}
"""Settings, precision, and the largest relative difference of gradients. Losses come in fp32."""


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_documents_alone(case: str) -> None:
    changes, dtype, bound = CASES[case]
    expected_losses, expected = each_alone(dtype, **changes)
    ((losses, gradients),) = run_ranks(losses_and_gradients, 1, tiny_run(**changes), packed_step(), dtype)
    torch.testing.assert_close(losses_by_document(losses), expected_losses, atol=0.0, rtol=1e-6)
    assert_same_gradients(gradients, expected, bound)


@pytest.mark.parametrize(
    "layout, recompute, kernel",
    [
        ("tp2_sp", "none", "sdpa"),
        ("tp2_sp", "full", "sdpa"),
        ("pp2", "full", "sdpa"),
        ("pp2_vpp2", "none", "sdpa"),
        ("dp2_zero3", "full", "sdpa"),
        ("dp2_zero3", "none", "unfused"),  # hangs where ZeRO 3 sees how many documents a data rank has
    ],
)
def test_training_on_packed_documents_is_the_same_under_every_layout(layout: str, recompute: str, kernel: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    changes: dict[str, Any] = {f"parallel__{key}": value for key, value in parallel.items()}
    changes |= {"training__recompute": recompute, "kernels__attention": kernel}
    results = run_ranks(first_step, world_size, tiny_run(**changes))
    expected_losses, expected = each_alone()
    num_targets = sum(batch.num_target_tokens for batch in packed_step())
    mean = sum(one.sum().item() for one in expected_losses) / num_targets
    gradients: dict[str, Tensor] = {}
    for loss, part in results:
        assert loss == pytest.approx(mean, abs=2e-6)
        gradients.update(part)
    assert_same_gradients(gradients, expected, 1e-5)


def first_step(run: RunConfig) -> tuple[float, dict[str, Tensor]]:
    """Take one step on the packed documents; return its loss and this rank's whole gradients."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    gradients = record_gradients(stage, topology)
    batches = [as_seen_by(topology, batch) for batch in packed_step()[topology.dp_rank :: topology.dp_size]]
    result = StepRunner(run, stage, topology).train(0, batches)
    return result.sums.mean, gradients


def test_control_without_the_mask_documents_see_each_other() -> None:
    plain = [replace(batch, document_starts=row_starts(*batch.input_ids.shape)) for batch in packed_step()]
    ((losses, gradients),) = run_ranks(losses_and_gradients, 1, tiny_run(), plain)
    expected_losses, expected = each_alone()
    assert largest_difference(losses_by_document(losses), expected_losses) > 1e-2
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same_gradients(gradients, expected, 1e-3)


def test_control_positions_that_go_on_are_found() -> None:
    rows = [replace(batch, position_ids=torch.arange(LENGTH).expand(2, -1)) for batch in packed_step()]
    ((losses, _),) = run_ranks(losses_and_gradients, 1, tiny_run(**LEARNED), rows)
    assert largest_difference(losses_by_document(losses), each_alone(**LEARNED)[0]) > 1e-2


def test_xpos_alone_does_not_care_where_a_document_stands() -> None:
    """Scores depend on distances: a document's logits are the same wherever in the row it begins (decision 9)."""
    one, other = document(10, 1), document(14, 2)
    batches = [pack([[one, other]], LENGTH), pack([[other, one]], LENGTH)]
    (((first, second), _),) = run_ranks(losses_and_gradients, 1, tiny_run(), batches)
    torch.testing.assert_close(first[:, :10], second[:, 14:], atol=2e-6, rtol=0.0)
    torch.testing.assert_close(first[:, 10:], second[:, :14], atol=2e-6, rtol=0.0)


def test_a_row_of_one_document_is_bitwise_the_plain_path() -> None:
    whole, parts = [document(LENGTH, 5)], [document(9, 6), document(15, 7)]
    plain = pack([whole, whole], LENGTH)
    assert not plain.masks_documents
    (((masked, unmasked), _),) = run_ranks(losses_and_gradients, 1, tiny_run(), [pack([parts, whole], LENGTH), plain])
    assert torch.equal(masked[1], unmasked[1])


def test_recompute_replays_dropout_within_documents() -> None:
    dropout: dict[str, Any] = {"model__decoder__dropout": 0.1, "model__decoder__attention_dropout": 0.1}
    ((kept, kept_gradients),) = run_ranks(first_step, 1, tiny_run(**dropout))
    ((loss, gradients),) = run_ranks(first_step, 1, tiny_run(**dropout, training__recompute="full"))
    assert loss == kept
    assert all(torch.equal(gradients[name], gradient) for name, gradient in kept_gradients.items())
    ((undropped, _),) = run_ranks(first_step, 1, tiny_run())
    assert abs(loss - undropped) > 1e-3
