"""What the pieces of the model cost in a sequence, in counted operations: stages are balanced and described by it.

How many images a sequence holds is an assumption from the mixture, made before any data is read.
"""

from dataclasses import dataclass

from megatron_kosmos.config import RunConfig
from megatron_kosmos.observability.flops import (
    TRAINED,
    layer_forward_flops_per_token,
    output_forward_flops_per_token,
    resampler_forward_flops_per_image,
    vision_flops_per_image,
)
from megatron_kosmos.prompt import SOURCE_KINDS


@dataclass(frozen=True)
class PieceCosts:
    """Operations that one sequence of T tokens, with the images that it may be expected to hold, takes."""

    layer: float
    """In one decoder layer."""
    vision_side: float
    """In vision tower, resampler and projection."""
    output: float
    """In the projection to the vocabulary."""


def forward_costs(run: RunConfig) -> PieceCosts:
    """Return the operations of the forward pass."""
    vision = run.model.vision
    # What is frozen runs forward only, so this is the forward cost of all of it.
    tower = vision_flops_per_image(vision, num_frozen_layers=vision.num_layers)
    layer, output = _forward_of_decoder(run)
    return PieceCosts(layer, images_per_sequence(run) * (tower + _resampler(run)), output)


def training_costs(run: RunConfig) -> PieceCosts:
    """Return the operations of a training step: forward, backward where there is one, and recomputation."""
    layer, output = _forward_of_decoder(run)
    layer_passes = TRAINED + 1 if run.training.recompute == "full" else TRAINED
    image = vision_flops_per_image(run.model.vision, num_frozen_vision_layers(run)) + TRAINED * _resampler(run)
    return PieceCosts(layer_passes * layer, images_per_sequence(run) * image, TRAINED * output)


def num_frozen_vision_layers(run: RunConfig) -> int:
    """Return the layers of the vision tower, from the bottom, that nothing below or in them is trained."""
    freezes, vision = run.optimizer.freezes, run.model.vision
    if not freezes("vision_tower.embeddings.patch_embedding.weight"):
        return 0
    layers = (f"vision_tower.encoder.layers.{number}.mlp.fc1.weight" for number in range(vision.num_layers))
    return next((number for number, name in enumerate(layers) if not freezes(name)), vision.num_layers)


def images_per_sequence(run: RunConfig) -> float:
    """Return the images that a sequence of the training mixture holds, if captions come with one every 2 L tokens and
    interleaved documents with one every 4 L (L slots an image)."""
    weights = dict.fromkeys(SOURCE_KINDS, 0.0)
    for corpus in run.data.train:
        weights[corpus.kind] += corpus.weight
    images_per_token = (weights["caption"] / 2 + weights["interleaved"] / 4) / run.model.resampler.num_latents
    return run.data.sequence_length * images_per_token / sum(weights.values())


def _forward_of_decoder(run: RunConfig) -> tuple[int, int]:
    """Return the forward operations of one layer and of the output projection."""
    decoder, length = run.model.decoder, run.data.sequence_length
    return length * layer_forward_flops_per_token(decoder, length), length * output_forward_flops_per_token(decoder)


def _resampler(run: RunConfig) -> int:
    return resampler_forward_flops_per_image(run.model.resampler, run.model.vision, run.model.decoder.width)
