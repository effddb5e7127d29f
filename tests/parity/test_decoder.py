"""The decoder is torchscale's: same weights, same logits, loss and gradients, whole and cut by tensor parallelism."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import RunConfig
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_run
from tests.parity.fidelity import Record
from tests.parity.oracles import DecoderNames, gradients_of, torchscale_decoder, torchscale_in_fp64
from tests.parity.ours import DEPTH, FP32, FP64, LAYOUTS, LIFTED, Case, Result, compute_all, layout_changes, num_ranks

pytestmark = [pytest.mark.parity, pytest.mark.distributed]

LENGTH, MAX_LENGTH, BATCH, SEED = 24, 40, 3, 7
VARIANTS: dict[str, dict[str, object]] = {
    "xpos": {"xpos": True},
    "xpos_scaled_tied": {"xpos": True, "scale_embeddings": True, "tie_embeddings": True},
    "xpos_and_positions": {"xpos": True, "positions": "learned"},
    "positions_tied": {"xpos": False, "positions": "learned", "tie_embeddings": True},
    "positions_scaled": {"xpos": False, "positions": "learned", "scale_embeddings": True},
    "neither": {"xpos": False},
}
BOUNDS = {FP32: 1e-6, FP64: 1e-6, LIFTED: 1e-12}


def run_config(variant: str, layout: str, precision: str) -> RunConfig:
    decoder = {"num_layers": DEPTH[precision], "max_sequence_length": MAX_LENGTH, **VARIANTS[variant]}
    return tiny_run(**{f"model__decoder__{field}": value for field, value in decoder.items()}, **layout_changes(layout))


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
def reference(variant: str, precision: str) -> tuple[dict[str, Tensor], Result]:
    """Return torchscale's weights under our names, and what it computes with them."""
    model = run_config(variant, "one rank", precision).model
    oracle = torchscale_decoder(model.decoder, SEED)
    # No id of the padding occurs and its logits are masked, so that its weights may be anything and get no gradient.
    weights = DecoderNames(model.decoder, padding=50.0)(oracle.state_dict())
    oracle.to(torch.float32 if precision == FP32 else torch.float64)
    batch = text_batch(model.decoder.vocab_size, model.vision.image_size)
    with torchscale_in_fp64(oracle) if precision == LIFTED else nullcontext():
        logits, _ = oracle(batch.input_ids)
    loss = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask])
    loss.backward()
    gradients = DecoderNames(model.decoder, padding=0.0)(gradients_of(oracle))
    return weights, Result(logits.detach(), loss.detach(), gradients)


@cache
def computed(layout: str) -> list[dict[str, Result]]:
    """Return what each rank of a layout computes of every variant in every precision."""
    cases = {
        f"{variant} in {precision}": case(variant, layout, precision, reference(variant, precision)[0])
        for variant in VARIANTS
        for precision in BOUNDS
    }
    return run_ranks(compute_all, num_ranks(layout), cases)


def case(variant: str, layout: str, precision: str, weights: dict[str, Tensor]) -> Case:
    run = run_config(variant, layout, precision)
    return Case(run, weights, text_batch(run.model.decoder.vocab_size, run.model.vision.image_size), precision)


def compare(fidelity: Record, actual: Result, expected: Result, precision: str, layout: str) -> None:
    with_torchscale = fidelity.of("torchscale `Decoder`", precision, layout)
    with_torchscale.values("logits", actual.logits, expected.logits, BOUNDS[precision])
    with_torchscale.values("loss", actual.loss, expected.loss, BOUNDS[precision])
    with_torchscale.gradients(actual.gradients, expected.gradients, BOUNDS[precision])


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_gradients_are_those_of_torchscale(
    fidelity: Record, layout: str, variant: str, precision: str
) -> None:
    _, expected = reference(variant, precision)
    assert 0.5 < expected.logits.std() < 5
    for results in computed(layout):
        if precision == FP64:
            assert (results[f"{variant} in {precision}"].logits - expected.logits).abs().max() < 1e-6
        compare(fidelity, results[f"{variant} in {precision}"], expected, precision, layout)


@pytest.mark.parametrize("layer_part", ["self_attention.linear_proj", "mlp.linear_fc2"])
def test_control_a_sub_layer_norm_in_the_wrong_place_is_found(layer_part: str) -> None:
    """Both tensor ranks with the first one's share of the sub-LN, as if it were replicated."""
    weights, expected = reference("xpos", FP64)
    name = f"decoder.layers.1.{layer_part}.norm.weight"
    wrong = {**weights, name: weights[name].chunk(2)[0].repeat(2)}
    for results in run_ranks(compute_all, 2, {"wrong": case("xpos", "TP2", FP64, wrong)}):
        assert (results["wrong"].logits - expected.logits).abs().max() > 1e-2
        with pytest.raises(AssertionError, match="logits against torchscale"):
            compare(Record(), results["wrong"], expected, FP64, "TP2")


def test_control_the_gradients_of_another_loss_are_found() -> None:
    _, expected = reference("xpos", FP64)
    norm = "decoder.layers.0.input_layernorm.weight"
    wrong = expected._replace(gradients={**expected.gradients, norm: expected.gradients[norm] * (1 + 2e-6)})
    with pytest.raises(AssertionError, match=f"gradients against torchscale .*{norm}"):
        compare(Record(), wrong, expected, FP64, "one rank")
