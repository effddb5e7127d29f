"""With KOSMOS-2's settings the model is transformers' Kosmos2ForConditionalGeneration, images and padding included."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import CrossAttentionConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.cross_attention import CrossAttentionResampler
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LATENTS, LENGTH, SIDE, VOCAB, tiny_run
from tests.parity.fidelity import Record
from tests.parity.oracles import gradients_of
from tests.parity.oracles_kosmos2 import PAD, Kosmos2Names, default_dtype, kosmos2
from tests.parity.ours import DEPTH, FP32, FP64, LAYOUTS, LIFTED, Case, Result, compute_all, layout_changes, num_ranks

pytestmark = [pytest.mark.parity, pytest.mark.distributed]

SETTINGS: dict[str, Any] = {
    "model__decoder__xpos": False,
    "model__decoder__positions": "sinusoidal",
    "model__decoder__scale_embeddings": True,
    "model__decoder__tie_embeddings": True,
    "model__vision__features": "normalized",
    "model__vision__activation": "quick_gelu",
    "model__resampler": {
        "kind": "cross_attention",
        "num_latents": LATENTS,
        "num_heads": 4,
        "attention_dropout": 0.0,
    },
    "optimizer__groups": [],
}
IMAGES = {"text": [], "text, image and padding": [(0, 4), (1, 1), (1, 9)]}
"""By what a batch holds: row and column of each image's first slot."""
REAL_TOKENS = (LENGTH, 17, 20)
BOUNDS = {FP32: 1e-6, FP64: 1e-6, LIFTED: 1e-10}
SEED = 10


def run_config(precision: str, layout: str = "one rank") -> RunConfig:
    depth = {"model__decoder__num_layers": DEPTH[precision], "model__vision__num_layers": DEPTH[precision]}
    return tiny_run(**SETTINGS, **depth, **layout_changes(layout))


def make_batch(content: str) -> MultimodalBatch:
    """Return three rows, the last two padded behind their real tokens."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(PAD + 1, VOCAB, (len(REAL_TOKENS), LENGTH), generator=draw)
    real = torch.arange(LENGTH) < torch.tensor(REAL_TOKENS)[:, None]
    ids[~real] = PAD
    has_target = torch.rand(real.shape, generator=draw) < 0.7
    # The last real token has nothing to predict, and transformers has no label for the last column.
    has_target &= F.pad(real[:, 1:], (0, 1), value=False)
    image_positions = torch.tensor(IMAGES[content], dtype=torch.int64).view(-1, 2)
    return MultimodalBatch(
        input_ids=ids,
        labels=ids.roll(-1, dims=1),
        loss_mask=has_target,
        position_ids=torch.arange(LENGTH).expand(len(REAL_TOKENS), -1),
        document_starts=row_starts(len(REAL_TOKENS), LENGTH),
        images=torch.randn(len(image_positions), 3, SIDE, SIDE, generator=draw),
        image_positions=image_positions,
        sources=torch.zeros(len(REAL_TOKENS), dtype=torch.int64),
    )


def is_real(batch: MultimodalBatch) -> Tensor:
    return batch.input_ids != PAD


def shifted_labels(batch: MultimodalBatch) -> Tensor:
    """Return labels [B, T] as transformers wants them: of the token itself, -100 where it is no target."""
    labels = batch.labels.masked_fill(~batch.loss_mask, -100)
    return F.pad(labels[:, :-1], (1, 0), value=-100)


@cache
def reference(content: str, precision: str) -> tuple[dict[str, Tensor], Result]:
    """Return transformers' weights under our names, and what it computes with them: its text model, or all of it."""
    model = run_config(precision).model
    oracle = kosmos2(model, SEED).to(torch.float32 if precision == FP32 else torch.float64)
    batch = make_batch(content)
    inputs = {"input_ids": batch.input_ids, "attention_mask": is_real(batch).long(), "labels": shifted_labels(batch)}
    with default_dtype(oracle.dtype):
        if content == "text":
            output = oracle.text_model(**inputs)
        else:
            images = batch.images.to(oracle.dtype)
            output = oracle(pixel_values=images, image_embeds_position_mask=batch.slots(LATENTS), **inputs)
    loss = output.loss
    if precision == LIFTED:
        loss = F.cross_entropy(output.logits[batch.loss_mask], batch.labels[batch.loss_mask])
    loss.backward()
    used = oracle.text_model if content == "text" else oracle
    prefix = "text_model." if content == "text" else ""
    gradients = {prefix + name: gradient for name, gradient in gradients_of(used).items()}
    weights = {name: tensor for name, tensor in oracle.state_dict().items() if name.startswith(prefix)}
    renamed = Kosmos2Names(model, padding=0.0)(gradients)
    return Kosmos2Names(model, padding=50.0)(weights), Result(output.logits.detach(), loss.detach(), renamed)


@cache
def computed(layout: str) -> list[dict[str, Result]]:
    """Return what each rank of a layout computes of every batch in every precision."""
    cases = {
        f"{content} in {precision}": Case(
            run_config(precision, layout), reference(content, precision)[0], make_batch(content), precision
        )
        for content in IMAGES
        for precision in BOUNDS
    }
    return run_ranks(compute_all, num_ranks(layout), cases)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("content", IMAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_gradients_are_those_of_transformers(
    fidelity: Record, layout: str, content: str, precision: str
) -> None:
    """Logits at real positions; every gradient of theirs is one of ours, and the other way round."""
    weights, expected = reference(content, precision)
    real, bound = is_real(make_batch(content)), BOUNDS[precision]
    assert 0.5 < expected.logits[real].std() < 5
    assert expected.gradients.keys() == weights.keys()
    for results in computed(layout):
        actual = results[f"{content} in {precision}"]
        with_transformers = fidelity.of(f"transformers `Kosmos2`: {content}", precision, layout)
        with_transformers.values("logits", actual.logits[real], expected.logits[real], bound)
        with_transformers.values("loss", actual.loss, expected.loss, bound)
        with_transformers.gradients(actual.gradients, expected.gradients, bound)


def test_every_parameter_has_a_counterpart() -> None:
    weights, _ = reference("text, image and padding", LIFTED)
    names = run_ranks(named_on_one_rank, 1, run_config(LIFTED))[0]
    assert names == weights.keys()


def named_on_one_rank(run: RunConfig) -> set[str]:
    (chunk,) = build_chunks(run, derive_transformer_config(run), build_topology(run.parallel, torch.device("cpu")))
    return {named.name for named in named_parameters(chunk)}


@pytest.mark.parametrize("precision, bound", [(FP32, 1e-6), (FP64, 1e-10)])
def test_the_projection_of_images_is_that_of_transformers(fidelity: Record, precision: str, bound: float) -> None:
    model = run_config(precision).model
    assert isinstance(model.resampler, CrossAttentionConfig)
    dtype = torch.float32 if precision == FP32 else torch.float64
    names = Kosmos2Names(model, padding=0.0)
    oracle = kosmos2(model, SEED).image_to_text_projection.to(dtype)
    resampler = CrossAttentionResampler(model.resampler, model.vision.width, model.decoder.width).to(dtype)
    resampler.load_state_dict(
        {name.removeprefix("resampler."): tensor for name, tensor in names.of_projection(oracle.state_dict()).items()}
    )
    draw = torch.Generator().manual_seed(4)
    features = torch.randn(3, model.vision.num_patches, model.vision.width, generator=draw, dtype=dtype)
    theirs, ours = features.clone().requires_grad_(), features.clone().requires_grad_()
    expected, actual = oracle(theirs)[0], resampler(ours)
    direction = torch.randn(expected.shape, generator=draw, dtype=dtype)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    gradients = names.of_projection(gradients_of(oracle))
    found = {f"resampler.{name}": gradient for name, gradient in gradients_of(resampler).items()}
    with_transformers = fidelity.of("transformers `Kosmos2ImageToTextProjection`", precision)
    with_transformers.values("outputs", actual, expected, bound)
    assert ours.grad is not None
    assert theirs.grad is not None
    with_transformers.gradients(found | {"input": ours.grad}, gradients | {"input": theirs.grad}, bound)
