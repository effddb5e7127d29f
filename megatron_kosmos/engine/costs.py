"""What the pieces of the model cost, in counted operations: stages are balanced and described by it, and MFU counts it.

What a piece costs in a training step follows from what is trained: in it, and below it. How many images a sequence
holds is an assumption from the mixture, made before any data is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.pieces import PieceKind, pieces
from megatron_kosmos.observability.flops import (
    FORWARD_ONLY,
    Backward,
    Products,
    attention_products,
    decoder_layer_products,
    feature_products,
    output_products,
    patch_embedding_products,
    resampler_products,
    vision_layer_products,
)
from megatron_kosmos.prompt import SOURCE_KINDS


@dataclass(frozen=True)
class PieceCosts:
    """Operations that one sequence of T tokens, with the images that it may be expected to hold, takes."""

    layers: tuple[float, ...]
    """In each decoder layer."""
    vision_side: float
    """In vision tower, resampler and projection."""
    output: float
    """In the projection to the vocabulary."""

    @property
    def total(self) -> float:
        """In the whole model."""
        return sum(self.layers) + self.vision_side + self.output

    @property
    def mean_layer(self) -> float:
        """In a decoder layer, where what is frozen makes them differ."""
        return sum(self.layers) / len(self.layers)


def forward_costs(run: RunConfig) -> PieceCosts:
    """Return the operations of the forward pass."""
    layer, output = (run.data.sequence_length * products.forward for products in _products_of_a_token(run))
    image = sum(products.forward for products, _ in _image_work(run))
    return PieceCosts((layer,) * run.model.decoder.num_layers, images_per_sequence(run) * image, output)


def training_costs(run: RunConfig) -> PieceCosts:
    """Return the operations of a training step: forward, backward where there is one, and recomputation."""
    layer, output = (products * run.data.sequence_length for products in _products_of_a_token(run))
    recomputes = run.training.recompute == "full"
    layers = tuple(
        layer.training(backward) + layer.forward * (recomputes and backward != FORWARD_ONLY)
        for backward in _backward(run, "decoder_layer")
    )
    return PieceCosts(layers, images_per_sequence(run) * _image(run), output.training(*_backward(run, "output")))


def training_flops(run: RunConfig, num_tokens: int, num_images: int, num_pairs: int) -> int:
    """Return the operations of a training step over `num_tokens` positions and `num_images` real images.

    `num_pairs` are the pairs of a query and a key that attention computes, fewer where documents are masked.
    Recomputation doesn't count: what is done twice is no more model.
    """
    token, output = _products_of_a_token(run)
    attention = attention_products(run.model.decoder, num_pairs)
    layer = Products(num_tokens * token.weights, attention.activations)
    layers = sum(layer.training(backward) for backward in _backward(run, "decoder_layer"))
    outputs = num_tokens * output.training(*_backward(run, "output"))
    return layers + outputs + num_images * _image(run)


def images_per_sequence(run: RunConfig) -> float:
    """Return the images that a sequence of the training mixture holds, if captions come with one every 2 L tokens and
    interleaved documents with one every 4 L (L slots an image)."""
    weights = dict.fromkeys(SOURCE_KINDS, 0.0)
    for corpus in run.data.train:
        weights[corpus.kind] += corpus.weight
    images_per_token = (weights["caption"] / 2 + weights["interleaved"] / 4) / run.model.resampler.num_latents
    return run.data.sequence_length * images_per_token / sum(weights.values())


def _products_of_a_token(run: RunConfig) -> tuple[Products, Products]:
    """Return what a token takes in one decoder layer and in the output projection."""
    decoder = run.model.decoder
    return decoder_layer_products(decoder, run.data.sequence_length), output_products(decoder)


def _image(run: RunConfig) -> int:
    """Return the operations of a training step on one image."""
    return sum(products.training(backward) for products, backward in _image_work(run))


def _image_work(run: RunConfig) -> Iterator[tuple[Products, Backward]]:
    """Yield what an image takes in each piece of the vision side, and what is computed there in the backward pass."""
    vision, resampler, width = run.model.vision, run.model.resampler, run.model.decoder.width
    (embedding,) = _backward(run, "vision_embedding")
    yield patch_embedding_products(vision), Backward(of_input=False, of_weights=embedding.of_weights)
    for backward in _backward(run, "vision_layer"):
        yield vision_layer_products(vision), backward
    (tower,), (backward,) = _backward(run, "vision_norm"), _backward(run, "resampler")
    features = Backward(of_input=tower.of_input, of_weights=backward.of_weights)
    yield feature_products(resampler, vision, width), features
    yield resampler_products(resampler, vision, width), backward


def _backward(run: RunConfig, kind: PieceKind) -> list[Backward]:
    """Return what the backward pass computes in each piece of `kind`, from the lowest.

    In a piece that is trained itself gradients go through its products too, for its norms stand below them.
    """
    found, is_reached, freezes = [], False, run.optimizer.freezes
    for piece in pieces(run.model):
        trains_matrices = not all(map(freezes, piece.matrices))
        is_reached = is_reached or trains_matrices or not all(map(freezes, piece.others))
        if piece.kind == kind:
            found.append(Backward(is_reached, trains_matrices))
    return found
