"""This package's model with an oracle's weights: what every rank of a layout computes of a batch, in each precision."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import local_part
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.model.xpos import XPos
from megatron_kosmos.optim.finalization import finalize_gradients
from megatron_kosmos.parallel.topology import Topology, build_topology
from tests.distributed.training import gather
from tests.parity.oracles import torchscale_tables

FP32, FP64, LIFTED = "fp32", "fp64", "fp64, islands lifted"
"""Precisions. LIFTED also computes in fp64 what production keeps in fp32: xPos's tables."""

DEPTH = {FP32: 1, FP64: 2, LIFTED: 2}
"""Layers of decoder and vision tower. Rounding in fp32 grows with every layer: from four on it alone brings gradients
to 1e-6, the oracles' own against their fp64 as well as ours."""

LAYOUTS: dict[str, dict[str, object]] = {
    "one rank": {},
    "TP2": {"tensor_parallel_size": 2},
    "TP2+SP": {"tensor_parallel_size": 2, "sequence_parallel": True},
}


class Result(NamedTuple):
    """Logits [B, T, V], the mean loss over targets in nats, and every whole gradient by global name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


class Case(NamedTuple):
    """Something to compute. `weights` are whole fp64 tensors by global name; `batch` is the same on every rank."""

    run: RunConfig
    weights: Mapping[str, Tensor]
    batch: MultimodalBatch
    precision: str


def layout_changes(layout: str) -> dict[str, object]:
    """Return the changes of a tiny configuration that make `layout` of it."""
    return {f"parallel__{field}": value for field, value in LAYOUTS[layout].items()}


def num_ranks(layout: str) -> int:
    return 1 if layout == "one rank" else 2


def compute_all(cases: Mapping[str, Case]) -> dict[str, Result]:
    """What each rank does: compute `cases`, all of one layout."""
    (parallel,) = {case.run.parallel.model_dump_json(): case.run.parallel for case in cases.values()}.values()
    topology = build_topology(parallel, torch.device("cpu"))
    return {name: compute(case, topology) for name, case in cases.items()}


def compute(case: Case, topology: Topology) -> Result:
    """Load this rank's parts of the weights and compute logits, loss and the gradients of the parameters named."""
    chunk = load(case.run, case.weights, case.precision, topology)
    batch = as_precise(case.batch.for_tensor_rank(topology.tp_rank, topology.tp_size), case.precision)
    with torch.no_grad():
        logits = chunk.logits(batch)
    loss = chunk(batch).total / batch.num_target_tokens
    loss.backward()
    return Result(logits, loss.detach(), whole_gradients(chunk, case.weights, topology))


def load(run: RunConfig, weights: Mapping[str, Tensor], precision: str, topology: Topology) -> KosmosModel:
    """Build this rank's model with its parts of the weights; parameters without one hold noise."""
    transformer = derive_transformer_config(run)
    dtype = torch.float32 if precision == FP32 else torch.float64
    transformer.params_dtype = dtype
    (chunk,) = build_chunks(run, transformer, topology)
    chunk = chunk.to(dtype).eval()
    named = {named.name: named for named in named_parameters(chunk)}
    assert weights.keys() <= named.keys(), weights.keys() - named.keys()
    with torch.no_grad():
        for name, cut in named.items():
            if name in weights:
                cut.parameter.copy_(local_part(weights[name], cut.shard_dim, chunk))
            else:
                torch.nn.init.normal_(cut.parameter)  # A part that must not reach what is compared.
    if precision == LIFTED:
        for module in chunk.modules():
            if isinstance(module, XPos):
                decoder = run.model.decoder
                for name, table in torchscale_tables(decoder.head_size, decoder.max_sequence_length).items():
                    assert module.get_buffer(name).shape == table.shape
                    setattr(module, name, table)
    return chunk


def whole_gradients(chunk: KosmosModel, weights: Mapping[str, Tensor], topology: Topology) -> dict[str, Tensor]:
    """Finalize the gradients as training does and return those of the parameters in `weights`, whole."""
    finalize_gradients(chunk.parameters(), lambda parameter: parameter.grad, topology)
    gradients = {}
    for cut in named_parameters(chunk):
        if cut.name in weights and cut.parameter.requires_grad:
            assert cut.parameter.grad is not None, cut.name
            gradients[cut.name] = gather(cut.parameter.grad, cut.shard_dim, topology)
    return gradients


def as_precise(batch: MultimodalBatch, precision: str) -> MultimodalBatch:
    """Return the batch with images in the dtype of `precision`."""
    return replace(batch, images=batch.images.to(torch.float32 if precision == FP32 else torch.float64))
