"""The decoder is torchscale's: same weights, same logits, same gradients, whole and cut by tensor parallelism."""

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import local_part
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.optim.finalization import finalize_gradients
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_run
from tests.distributed.training import gather
from tests.parity.oracles import DecoderNames, gradients_of, torchscale_decoder, torchscale_in_fp64

pytestmark = [pytest.mark.parity, pytest.mark.distributed]

LENGTH, MAX_LENGTH, BATCH = 24, 40, 3
VARIANTS = {
    "xpos": {"xpos": True},
    "xpos_and_positions": {"xpos": True, "positions": "learned"},
    "positions_tied": {"xpos": False, "positions": "learned", "tie_embeddings": True},
}
LAYOUTS = {
    "one_rank": (1, {}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
}


class Result(NamedTuple):
    """Logits [B, T, V] and every whole gradient of the mean loss over targets, by global name."""

    logits: Tensor
    gradients: dict[str, Tensor]


def run_config(variant: str, layout: str) -> RunConfig:
    decoder = {"max_sequence_length": MAX_LENGTH, **VARIANTS[variant]}
    changes = {f"model__decoder__{field}": value for field, value in decoder.items()}
    return tiny_run(**changes, **{f"parallel__{field}": value for field, value in LAYOUTS[layout][1].items()})


def text_batch(vocab_size: int, image_size: int) -> MultimodalBatch:
    draw = torch.Generator().manual_seed(11)
    ids = torch.randint(0, vocab_size, (BATCH, LENGTH + 1), generator=draw)
    return MultimodalBatch(
        input_ids=ids[:, :-1],
        labels=ids[:, 1:],
        loss_mask=torch.rand(BATCH, LENGTH, generator=draw) < 0.7,
        position_ids=torch.arange(LENGTH).expand(BATCH, -1),
        document_starts=row_starts(BATCH, LENGTH),
        images=torch.empty(0, 3, image_size, image_size),
        image_positions=torch.empty(0, 2, dtype=torch.int64),
        sources=torch.zeros(BATCH, dtype=torch.int64),
    )


@cache
def reference(variant: str, *, in_fp64: bool = False) -> tuple[dict[str, Tensor], Result]:
    """Return torchscale's weights under our names, and what it computes with them: as it is, or in fp64 throughout."""
    model = run_config(variant, "one_rank").model
    oracle = torchscale_decoder(model.decoder, seed=7)
    batch = text_batch(model.decoder.vocab_size, model.vision.image_size)
    with torchscale_in_fp64(oracle) if in_fp64 else nullcontext():
        logits, _ = oracle(batch.input_ids)
    F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask]).backward()
    # No id of the padding occurs and its logits are masked, so that its weights may be anything and get no gradient.
    weights = DecoderNames(model.decoder, padding=50.0)(oracle.state_dict())
    return weights, Result(logits.detach(), DecoderNames(model.decoder, padding=0.0)(gradients_of(oracle)))


def compute(run: RunConfig, weights: dict[str, Tensor], has_fp64_loss: bool = False) -> Result:
    """What each rank does: load its parts of `weights` in fp64, and compute.

    megatron-core's loss, which training uses, is computed in fp32.
    """
    topology = build_topology(run.parallel, torch.device("cpu"))
    transformer = derive_transformer_config(run)
    transformer.params_dtype = torch.float64
    (chunk,) = build_chunks(run, transformer, topology)
    chunk = chunk.double().eval()
    named = {named.name: named for named in named_parameters(chunk) if is_decoder(named.name)}
    assert named.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if name not in named:
                torch.nn.init.normal_(parameter)  # The vision side: must not reach a text.
        for name, weight in weights.items():
            named[name].parameter.copy_(local_part(weight, named[name].shard_dim, chunk))
    batch = text_batch(run.model.decoder.vocab_size, run.model.vision.image_size)
    logits = chunk.logits(batch)
    if has_fp64_loss:
        F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask]).backward()
    else:
        (chunk(batch).sum() / batch.num_target_tokens).backward()
    finalize_gradients(chunk.parameters(), lambda parameter: parameter.grad, topology)
    gradients = {}
    for name, cut in named.items():
        assert cut.parameter.grad is not None, name
        gradients[name] = gather(cut.parameter.grad, cut.shard_dim, topology)
    return Result(logits.detach(), gradients)


def is_decoder(name: str) -> bool:
    return not name.startswith(("vision_tower.", "resampler."))


def assert_same(actual: Result, expected: Result, logit_error: float, gradient_error: float) -> None:
    """Compare logits absolutely and each gradient relative to its norm."""
    torch.testing.assert_close(
        actual.logits, expected.logits, rtol=0, atol=logit_error, msg=lambda text: f"logits: {text}"
    )
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.norm() > 1e-4, f"nothing to compare: {name}"
        error = ((actual.gradients[name] - gradient).norm() / gradient.norm()).item()
        assert error < gradient_error, f"gradient of {name}: {error:.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_those_of_torchscale(layout: str, variant: str) -> None:
    weights, expected = reference(variant)
    assert 0.5 < expected.logits.std() < 5
    for actual in run_ranks(compute, LAYOUTS[layout][0], run_config(variant, layout), weights):
        assert_same(actual, expected, logit_error=1e-6, gradient_error=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_tables_and_islands_in_fp32_nothing_differs_but_rounding(layout: str) -> None:
    weights, expected = reference("positions_tied", in_fp64=True)
    for actual in run_ranks(compute, LAYOUTS[layout][0], run_config("positions_tied", layout), weights, True):
        assert_same(actual, expected, logit_error=1e-12, gradient_error=1e-11)


@pytest.mark.parametrize("layer_part", ["self_attention.linear_proj", "mlp.linear_fc2"])
def test_control_a_sub_layer_norm_in_the_wrong_place_is_found(layer_part: str) -> None:
    """Both tensor ranks with the first one's share of the sub-LN, as if it were replicated."""
    weights, expected = reference("xpos")
    name = f"decoder.layers.3.{layer_part}.norm.weight"
    wrong = {**weights, name: weights[name].chunk(2)[0].repeat(2)}
    for actual in run_ranks(compute, 2, run_config("xpos", "tp2"), wrong):
        with pytest.raises(AssertionError, match="logits"):
            assert_same(actual, expected, logit_error=1e-2, gradient_error=1e-6)
