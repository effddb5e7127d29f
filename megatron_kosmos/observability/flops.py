"""Counted floating-point operations of the model's pieces, and what share of the hardware's peak they are.

Only matrix products count, two operations a multiply-add. What the hardware does besides does not count: padding of the
vocabulary, blank images of text-only microbatches. Attention counts the pairs of a query and a key that it
sees: half of a row's square, and where documents are masked half of the squares of the documents. The projection to the
vocabulary counts every token and does less: in training only tokens with a target go through it.

In a training step a product with a weight costs its forward pass once more where its input needs a gradient, and once
more where the weight is trained. A product of two activations (attention's scores and weighted values) costs twice its
forward pass more wherever gradients go through it.

Shape letters: T tokens, D decoder width, H heads, K head size, I images, P patches, L latents, E vision width,
F ffn width, V vocab; G query groups, S image side in pixels.
"""

from dataclasses import dataclass
from typing import Final

from megatron_kosmos.config import (
    CrossAttentionConfig,
    DecoderConfig,
    PerceiverConfig,
    ResamplerConfig,
    VisionConfig,
)

PEAK_BF16_FLOPS: Final = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 operations a second by a part of the device's name, from NVIDIA's data sheets; the first match counts."""


@dataclass(frozen=True)
class Backward:
    """What the backward pass computes in a piece of the model."""

    of_input: bool
    """Gradients go through it: it, or something below it, is trained."""
    of_weights: bool
    """Its matrices are trained."""


FORWARD_ONLY: Final = Backward(of_input=False, of_weights=False)
WHOLE: Final = Backward(of_input=True, of_weights=True)


@dataclass(frozen=True)
class Products:
    """Forward operations of a piece of the model."""

    weights: int
    """Products with weights."""
    activations: int = 0
    """Products of activations with each other."""

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return self.weights + self.activations

    def training(self, backward: Backward) -> int:
        """Return the operations of forward and backward pass."""
        activation_passes = 3 if backward.of_input or backward.of_weights else 1
        return (1 + backward.of_input + backward.of_weights) * self.weights + activation_passes * self.activations

    def __mul__(self, times: int) -> "Products":
        return Products(self.weights * times, self.activations * times)


def decoder_layer_products(decoder: DecoderConfig, sequence_length: int) -> Products:
    """Return what one of T = `sequence_length` tokens takes in one decoder layer.

    qkv 2·D·(D + 2·G·K), output 2·D·D, FFN 4·D·F, and attention's causal half: scores and weighted values are 4·T·D a
    token in full, of which the triangle at and below the diagonal is (T + 1)/2T.
    """
    groups = decoder.num_query_groups or decoder.num_heads
    projections = 2 * decoder.width * (2 * decoder.width + 2 * groups * decoder.head_size)
    ffn = 4 * decoder.width * decoder.ffn_width
    return Products(projections + ffn, 2 * (sequence_length + 1) * decoder.width)


def causal_pairs(length: int) -> int:
    """Return the pairs of a query and a key at or before it in a segment of so many tokens."""
    return length * (length + 1) // 2


def attention_products(decoder: DecoderConfig, num_pairs: int) -> Products:
    """Return what so many pairs of query and key take in one decoder layer: score and weighted value, 4·D a pair."""
    return Products(0, 4 * decoder.width * num_pairs)


def output_products(decoder: DecoderConfig) -> Products:
    """Return what a token takes in the projection to the vocabulary: 2·D·V."""
    return Products(2 * decoder.width * decoder.vocab_size)


def patch_embedding_products(vision: VisionConfig) -> Products:
    """Return what an image takes in the embedding of its patches: 2·(P - 1)·E·3·patch². Images need no gradient."""
    return Products(2 * (vision.num_patches - 1) * vision.width * 3 * vision.patch_size**2)


def vision_layer_products(vision: VisionConfig) -> Products:
    """Return what an image takes in one layer of the tower.

    Over P tokens: qkv and output 8·P·E², FFN 4·P·E·F, attention 4·P²·E.
    """
    width, patches = vision.width, vision.num_patches
    return Products(8 * patches * width**2 + 4 * patches * width * vision.ffn_width, 4 * patches**2 * width)


def feature_products(resampler: ResamplerConfig, vision: VisionConfig, decoder_width: int) -> Products:
    """Return what an image's features take in a weight that reads them as they are: KOSMOS-2's projection 2·P·E·D.

    The perceiver has none: what it adds and normalizes first is its own.
    """
    if isinstance(resampler, PerceiverConfig):
        return Products(0)
    return Products(2 * vision.num_patches * vision.width * decoder_width)


def resampler_products(resampler: ResamplerConfig, vision: VisionConfig, decoder_width: int) -> Products:
    """Return what an image takes in the resampler, without `feature_products`."""
    if isinstance(resampler, CrossAttentionConfig):
        return _cross_attention_products(resampler, vision, decoder_width)
    return _perceiver_products(resampler, vision, decoder_width)


def _perceiver_products(resampler: PerceiverConfig, vision: VisionConfig, decoder_width: int) -> Products:
    """Per layer, with inner width H·K: queries and output 4·L·E·H·K, keys and values of patches and latents
    4·(P + L)·E·H·K, attention 4·L·(P + L)·H·K, FFN 4·L·E·multiplier·E. Then the projection 2·L·E·D.
    """
    width, latents = vision.width, resampler.num_latents
    keys = vision.num_patches + latents
    inner = resampler.num_heads * resampler.head_size
    projections = 4 * latents * width * inner + 4 * keys * width * inner
    ffn = 4 * latents * width * resampler.ffn_multiplier * width
    return Products(
        resampler.depth * (projections + ffn) + 2 * latents * width * decoder_width,
        resampler.depth * 4 * latents * keys * inner,
    )


def _cross_attention_products(resampler: CrossAttentionConfig, vision: VisionConfig, decoder_width: int) -> Products:
    """Queries and output 4·L·D², keys and values of features and latents 4·(P + L)·D², attention 4·L·(P + L)·D."""
    latents = resampler.num_latents
    keys = vision.num_patches + latents
    return Products(4 * (latents + keys) * decoder_width**2, 4 * latents * keys * decoder_width)


def peak_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 operations a second of a device, or None for one that is not in the table (a CPU)."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)


def model_flops_utilization(
    flops: float, seconds: float, num_devices: int, peak_per_device: float | None
) -> float | None:
    """Return the share of the devices' peak that `flops` in `seconds` is, or None where the peak is not known."""
    return None if peak_per_device is None else flops / (seconds * num_devices * peak_per_device)
