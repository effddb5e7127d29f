"""In training dropout falls where torchscale's does: with equal random streams the two compute the same.

torchscale draws from one stream, this package activations from torch's and attention from megatron-core's, so the two
kinds are compared one by one. torchscale's modules are made to draw an element's bits as this package does.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torchscale.component.multihead_attention import MultiheadAttention

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import DecoderConfig, RunConfig
from megatron_kosmos.model.dropout import draw_kept, scale_of_kept
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import step_batches, tiny_run
from tests.parity.fidelity import Record
from tests.parity.oracles import DecoderNames, gradients_of, torchscale_decoder, torchscale_in_fp64
from tests.parity.ours import LIFTED, Result, load, whole_gradients

pytestmark = [pytest.mark.parity, pytest.mark.distributed]

SEED, BOUND = 21, 1e-10
KINDS = {
    "dropout of activations": {"dropout": 0.3},
    "dropout of attention": {"attention_dropout": 0.3},
}
ORACLE = "torchscale `Decoder` in training, {}"


class ActivationDropout(nn.Dropout):
    """Draws as `dropout` does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * draw_kept(x, self.p) * scale_of_kept(self.p) if self.training and self.p else x


class AttentionDropout(nn.Dropout):
    """Draws as the blocked attention does for a row that is one block: from a seed of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return x * draw_kept(x, self.p, generator) * scale_of_kept(self.p)


class Setting(NamedTuple):
    """What both models compute, one row of text: torchscale's activations are then drawn in our order, T by D."""

    run: RunConfig
    weights: dict[str, Tensor]
    batch: MultimodalBatch


def setting(kind: str) -> tuple[nn.Module, Setting]:
    changes: dict[str, Any] = {"num_layers": 2, "xpos": True, "positions": "learned", **KINDS[kind]}
    run = tiny_run(**{f"model__decoder__{field}": value for field, value in changes.items()})
    oracle = torchscale_decoder(run.model.decoder, seed=7).train()
    for module in list(oracle.modules()):
        for name, dropout in module.named_children():
            if isinstance(dropout, nn.Dropout):
                draws = AttentionDropout if isinstance(module, MultiheadAttention) else ActivationDropout
                setattr(module, name, draws(dropout.p))
    weights = DecoderNames(run.model.decoder, padding=50.0)(oracle.state_dict())
    return oracle, Setting(run, weights, first_row(step_batches(0, "t")[0]))


def first_row(batch: MultimodalBatch) -> MultimodalBatch:
    """Return the first sequence of a batch of text."""
    rows = {name: getattr(batch, name)[:1] for name in ("input_ids", "labels", "loss_mask", "position_ids", "sources")}
    return replace(batch, document_starts=row_starts(1, batch.input_ids.shape[1]), **rows)


def theirs(oracle: nn.Module, decoder: DecoderConfig, batch: MultimodalBatch) -> Result:
    torch.manual_seed(SEED)
    with torchscale_in_fp64(oracle):
        logits, _ = oracle(batch.input_ids)
    loss = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask])
    loss.backward()
    return Result(logits.detach(), loss.detach(), DecoderNames(decoder, padding=0.0)(gradients_of(oracle)))


def ours(setting: Setting) -> Result:
    """What the one rank does: start both of our streams where torchscale's starts, and compute."""
    topology = build_topology(setting.run.parallel, torch.device("cpu"))
    chunk = load(setting.run, setting.weights, LIFTED, topology).train()
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", SEED)
    torch.manual_seed(SEED)
    batch = setting.batch
    logits = chunk.logits(batch)
    loss = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask])
    loss.backward()
    return Result(logits.detach(), loss.detach(), whole_gradients(chunk, setting.weights, topology))


def compare(fidelity: Record, actual: Result, expected: Result, kind: str) -> None:
    with_torchscale = fidelity.of(ORACLE.format(kind), LIFTED)
    with_torchscale.values("logits", actual.logits, expected.logits, BOUND)
    with_torchscale.values("loss", actual.loss, expected.loss, BOUND)
    with_torchscale.gradients(actual.gradients, expected.gradients, BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_falls_where_torchscale_has_it(fidelity: Record, kind: str) -> None:
    oracle, same = setting(kind)
    expected = theirs(oracle, same.run.model.decoder, same.batch)
    without, _ = setting(kind)[0].eval()(same.batch.input_ids)
    assert (without - expected.logits).abs().max() > 0.1, "nothing was dropped"
    compare(fidelity, run_ranks(ours, 1, same)[0], expected, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["before the sub-LN", "not at all", "once more at the end"])
def test_control_another_place_is_found(kind: str, place: str) -> None:
    oracle, same = cast(tuple[Any, Setting], setting(kind))
    for layer in oracle.layers:
        attention = layer.self_attn
        if place == "before the sub-LN":
            # After it torchscale has the projection, then its dropout of activations.
            attention.inner_attn_ln = nn.Sequential(ActivationDropout(0.3), attention.inner_attn_ln)
        elif place == "not at all":
            attention.dropout_module = layer.dropout_module = nn.Identity()
    if place == "once more at the end":
        oracle.layer_norm = nn.Sequential(oracle.layer_norm, ActivationDropout(0.3))
    torch.manual_seed(SEED)
    with torchscale_in_fp64(oracle):
        logits, _ = oracle(same.batch.input_ids)
    with pytest.raises(AssertionError, match="logits against"):
        Record().of("torchscale", LIFTED).values("logits", run_ranks(ours, 1, same)[0].logits, logits, 1e-2)
