"""The vision side is transformers' CLIP and flamingo-pytorch's resampler, however images are split over ranks."""

from functools import cache
from typing import Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from megatron_kosmos.batch import share_of_images
from megatron_kosmos.config import PerceiverConfig, RunConfig, VisionConfig
from megatron_kosmos.model.vision import VisionTower, clip_config
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import SIDE, frozen_vision, tiny_run
from tests.parity.fidelity import Record
from tests.parity.oracles import flamingo_resampler, randomized, resampler_names
from tests.parity.ours import FP32, FP64, load, whole_gradients

pytestmark = pytest.mark.parity

LAYERS = 3
BOUNDS = {FP32: 1e-6, FP64: 1e-10}
Activation = Literal["quick_gelu", "gelu"]
Features = Literal["hidden", "normalized"]


def clip(config: VisionConfig, precision: str, seed: int = 3) -> CLIPVisionModel:
    """Return transformers' CLIP, no parameter of which is at a trivial value."""
    oracle: CLIPVisionModel = randomized(CLIPVisionModel(clip_config(config)).double().eval(), seed)
    return oracle.to(dtype_of(precision))


def dtype_of(precision: str) -> torch.dtype:
    return torch.float32 if precision == FP32 else torch.float64


def features_of(oracle: CLIPVisionModel, images: Tensor, features: Features) -> Tensor:
    """Return transformers' features [I, P, E]; the normalized ones as its Kosmos2 computes them."""
    hidden: Tensor = oracle(images).last_hidden_state
    return hidden if features == "hidden" else F.normalize(oracle.post_layernorm(hidden), dim=-1)


def draw(*shape: int, precision: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype_of(precision))


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("features", ["hidden", "normalized"])
@pytest.mark.parametrize("frozen_layers", [0, 2])
def test_features_and_gradients_are_those_of_clip(
    fidelity: Record, frozen_layers: int, features: Features, activation: Activation, precision: str
) -> None:
    """With the class token, and with a trunk that is frozen: it builds no graph, and above it nothing changes."""
    config = VisionConfig(
        width=16,
        ffn_width=40,
        num_layers=LAYERS if precision == FP64 else frozen_layers + 1,
        num_heads=2,
        image_size=24,
        patch_size=8,
        activation=activation,
        features=features,
    )
    oracle, tower = clip(config, precision), VisionTower(config).to(dtype_of(precision))
    tower.load_state_dict(oracle.state_dict(), strict=True)
    freeze(tower, frozen_layers)
    trunk: list[bool] = []
    for layer in tower.encoder.layers[:frozen_layers]:
        layer.register_forward_hook(lambda _layer, _inputs, output: trunk.append(output.requires_grad))
    images = draw(3, 3, 24, 24, precision=precision)
    expected, actual = features_of(oracle, images, features), tower(images)
    direction = draw(*expected.shape, precision=precision)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()

    assert actual.shape == (3, config.num_patches, 16)
    assert trunk == [False] * frozen_layers
    found = {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert found.keys() == {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    below = ("embeddings.", "pre_layrnorm.", *(f"encoder.layers.{number}." for number in range(frozen_layers)))
    trained = {name: grad for name, grad in gradients.items() if not (frozen_layers and name.startswith(below))}
    with_clip = fidelity.of(f"transformers `CLIPVisionModel`, {features} features", precision)
    with_clip.values("outputs", actual, expected, BOUNDS[precision])
    with_clip.gradients(found, trained, BOUNDS[precision])


def freeze(tower: VisionTower, frozen_layers: int) -> None:
    if frozen_layers:
        for module in (tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[:frozen_layers]):
            module.requires_grad_(False)


def test_control_the_class_token_the_last_layer_and_the_activation_matter() -> None:
    config = tiny_run().model.vision
    oracle, images = clip(config, FP64), draw(2, 3, SIDE, SIDE, precision=FP64)
    features = features_of(oracle, images, "hidden")
    states = oracle(images, output_hidden_states=True).hidden_states
    other = CLIPVisionModel(clip_config(config.model_copy(update={"activation": "gelu"}))).double()
    other.load_state_dict(oracle.state_dict())
    for wrong in (states[-2], features_of(other, images, "hidden"), features.roll(1, dims=1)):
        with pytest.raises(AssertionError, match="outputs against CLIP"):
            Record().of("CLIP", FP64).values("outputs", wrong, features, 1e-3)


class Embedded(NamedTuple):
    """Embeddings of a number of images [I, L, D], and whole gradients of the vision side by global name."""

    embeddings: Tensor
    gradients: dict[str, Tensor]


NUM_IMAGES = (0, 1, 3, 5)
FROZEN_LAYERS = {"all trained": 0, "trunk frozen": 2}
CASES = [("all trained", FP32), ("all trained", FP64), ("trunk frozen", FP64)]
"""fp32 at a depth of one layer each, where rounding stays below the bound."""


def run_config(tp_size: int, frozen: str, precision: str) -> RunConfig:
    return tiny_run(
        model__vision__num_layers=LAYERS if precision == FP64 else 1,
        model__resampler__depth=2 if precision == FP64 else 1,
        optimizer__groups=frozen_vision(FROZEN_LAYERS[frozen]),
        parallel__tensor_parallel_size=tp_size,
    )


@cache
def reference(frozen: str, precision: str) -> tuple[dict[str, Tensor], dict[int, Embedded]]:
    """Return the weights under our names, and what CLIP and the resampler compute of each number of images."""
    model = run_config(1, frozen, precision).model
    assert isinstance(model.resampler, PerceiverConfig)
    resampler = flamingo_resampler(model.resampler, model.vision.width, seed=3).to(dtype_of(precision))
    tower = clip(model.vision, precision)
    projection = nn.Linear(model.vision.width, model.decoder.width, bias=False, dtype=dtype_of(precision))
    randomized(projection, seed=7)
    parts = nn.ModuleDict({"tower": tower, "resampler": resampler, "projection": projection})
    results = {}
    for num_images in filter(None, NUM_IMAGES):
        parts.zero_grad()
        images = draw(max(NUM_IMAGES), 3, SIDE, SIDE, precision=precision)[:num_images]
        embeddings = projection(resampler(features_of(tower, images, "hidden")).squeeze(1))
        (embeddings * direction_of(embeddings)).sum().backward()
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in parts.named_parameters()
        }
        results[num_images] = Embedded(embeddings.detach(), named(gradients))
    return named(parts.state_dict()), results


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of CLIP, resampler and projection under our global names."""
    part = {
        kind: {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("tower", "resampler", "projection")
    }
    renamed = {f"vision_tower.{name}": tensor for name, tensor in part["tower"].items()}
    renamed |= {f"resampler.{name}": tensor for name, tensor in resampler_names(part["resampler"]).items()}
    return renamed | {"resampler.projection.weight": part["projection"]["weight"]}


def direction_of(embeddings: Tensor) -> Tensor:
    """Return the gradient that backward starts from: each image's own, nothing for the blank ones behind them."""
    precision = FP32 if embeddings.dtype == torch.float32 else FP64
    return draw(max(NUM_IMAGES), *embeddings.shape[1:], precision=precision)[: len(embeddings)]


def embed_on_ranks(cases: dict[str, tuple[RunConfig, dict[str, Tensor], str]]) -> dict[str, dict[int, Embedded]]:
    """What each rank does: embed its share of the images, gather them, and finalize the gradients."""
    topology = build_topology(next(iter(cases.values()))[0].parallel, torch.device("cpu"))
    results: dict[str, dict[int, Embedded]] = {name: {} for name in cases}
    for name, (run, weights, precision) in cases.items():
        chunk = load(run, weights, precision, topology)
        for num_images in NUM_IMAGES:
            chunk.zero_grad()
            images = draw(max(NUM_IMAGES), 3, SIDE, SIDE, precision=precision)[:num_images]
            share = share_of_images(num_images, topology.tp_rank, topology.tp_size)
            embeddings = chunk.embed_images(images[share], num_images)[:num_images]
            (embeddings * direction_of(embeddings)).sum().backward()
            results[name][num_images] = Embedded(embeddings.detach(), whole_gradients(chunk, weights, topology))
    return results


@cache
def computed(tp_size: int) -> list[dict[str, dict[int, Embedded]]]:
    cases = {
        f"{frozen} in {precision}": (run_config(tp_size, frozen, precision), reference(frozen, precision)[0], precision)
        for frozen, precision in CASES
    }
    return run_ranks(embed_on_ranks, tp_size, cases)


@pytest.mark.distributed
@pytest.mark.parametrize("frozen, precision", CASES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_images_split_over_ranks_are_embedded_as_by_one(
    fidelity: Record, tp_size: int, frozen: str, precision: str
) -> None:
    """Numbers of images that the ranks don't divide, none at all among them."""
    with_clip = fidelity.of(
        "transformers `CLIPVisionModel` and flamingo-pytorch", precision, f"TP{tp_size}" if tp_size > 1 else "one rank"
    )
    for results in computed(tp_size):
        ours = results[f"{frozen} in {precision}"]
        assert ours.keys() == set(NUM_IMAGES)
        assert not any(gradient.any() for gradient in ours[0].gradients.values())
        for num_images, theirs in reference(frozen, precision)[1].items():
            embedded = ours[num_images]
            trained = {name: theirs.gradients[name] for name in embedded.gradients}
            assert len(trained) >= 20
            with_clip.values("embeddings", embedded.embeddings, theirs.embeddings, BOUNDS[precision])
            with_clip.gradients(embedded.gradients, trained, BOUNDS[precision])
