"""Counted floating-point operations of a training step, and what share of the hardware's peak they are.

Only matrix products count, two operations a multiply-add. A product of the forward pass costs twice that again in the
backward pass (gradients of its input and of its weight), so trained parts count three times their forward. What the
hardware does besides does not count: recomputation, padding of the vocabulary, blank images of text-only microbatches.

Shape letters: T tokens, D decoder width, H heads, K head size, I images, P patches, L latents, E vision width,
F ffn width, V vocab; G query groups, S image side in pixels.
"""

from typing import Final

from megatron_kosmos.config import (
    CrossAttentionConfig,
    DecoderConfig,
    ModelConfig,
    PerceiverConfig,
    ResamplerConfig,
    VisionConfig,
)

TRAINED: Final = 3
"""Forward once, backward twice."""

PEAK_BF16_FLOPS: Final = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 operations a second by a part of the device's name, from NVIDIA's data sheets; the first match counts."""


def layer_forward_flops_per_token(decoder: DecoderConfig, sequence_length: int) -> int:
    """Return the forward operations of one of T = `sequence_length` tokens in one decoder layer.

    qkv 2·D·(D + 2·G·K), output 2·D·D, FFN 4·D·F, and attention's causal half: scores and weighted values are 4·T·D a
    token in full, of which the triangle at and below the diagonal is (T + 1)/2T.
    """
    groups = decoder.num_query_groups or decoder.num_heads
    projections = 2 * decoder.width * (2 * decoder.width + 2 * groups * decoder.head_size)
    ffn = 4 * decoder.width * decoder.ffn_width
    attention = 2 * (sequence_length + 1) * decoder.width
    return projections + ffn + attention


def output_forward_flops_per_token(decoder: DecoderConfig) -> int:
    """Return the forward operations of a token in the projection to the vocabulary: 2·D·V."""
    return 2 * decoder.width * decoder.vocab_size


def decoder_forward_flops_per_token(decoder: DecoderConfig, sequence_length: int) -> int:
    """Return the forward operations of one of T = `sequence_length` tokens, vocabulary projection included."""
    layers = decoder.num_layers * layer_forward_flops_per_token(decoder, sequence_length)
    return layers + output_forward_flops_per_token(decoder)


def vision_flops_per_image(vision: VisionConfig, num_frozen_layers: int) -> int:
    """Return the operations of one image through the tower: forward, and backward through what is
    trained: all but the first `num_frozen_layers` layers and what is below them.

    Per layer, over P tokens: qkv and output 8·P·E², FFN 4·P·E·F, attention 4·P²·E. The patch embedding is
    2·(P - 1)·E·3·patch²; its input needs no gradient, so training it costs twice its forward, not three times.
    """
    width, patches = vision.width, vision.num_patches
    layer = 8 * patches * width**2 + 4 * patches * width * vision.ffn_width + 4 * patches**2 * width
    trained_layers = vision.num_layers - num_frozen_layers
    embedding = 2 * (patches - 1) * width * 3 * vision.patch_size**2
    embedding_passes = 2 if num_frozen_layers == 0 else 1
    return layer * (num_frozen_layers + TRAINED * trained_layers) + embedding * embedding_passes


def resampler_forward_flops_per_image(resampler: ResamplerConfig, vision: VisionConfig, decoder_width: int) -> int:
    """Return the forward operations of one image through the resampler, the projection to D included."""
    if isinstance(resampler, CrossAttentionConfig):
        return _cross_attention_forward_flops(resampler, vision, decoder_width)
    return _perceiver_forward_flops(resampler, vision, decoder_width)


def _perceiver_forward_flops(resampler: PerceiverConfig, vision: VisionConfig, decoder_width: int) -> int:
    """Per layer, with inner width H·K: queries and output 4·L·E·H·K, keys and values of patches and latents
    4·(P + L)·E·H·K, attention 4·L·(P + L)·H·K, FFN 4·L·E·multiplier·E. Then the projection 2·L·E·D.
    """
    width, latents = vision.width, resampler.num_latents
    keys = vision.num_patches + latents
    inner = resampler.num_heads * resampler.head_size
    attention = 4 * latents * width * inner + 4 * keys * width * inner + 4 * latents * keys * inner
    ffn = 4 * latents * width * resampler.ffn_multiplier * width
    return resampler.depth * (attention + ffn) + 2 * latents * width * decoder_width


def _cross_attention_forward_flops(resampler: CrossAttentionConfig, vision: VisionConfig, decoder_width: int) -> int:
    """The projection 2·P·E·D; then queries and output 4·L·D², keys and values of features and latents 4·(P + L)·D²,
    attention 4·L·(P + L)·D.
    """
    latents, patches = resampler.num_latents, vision.num_patches
    keys = patches + latents
    attention = 4 * latents * decoder_width**2 + 4 * keys * decoder_width**2 + 4 * latents * keys * decoder_width
    return 2 * patches * vision.width * decoder_width + attention


def training_flops(
    model: ModelConfig, sequence_length: int, num_tokens: int, num_images: int, num_frozen_vision_layers: int = 0
) -> int:
    """Return the operations of a training step over `num_tokens` positions and `num_images` real images."""
    per_token = TRAINED * decoder_forward_flops_per_token(model.decoder, sequence_length)
    resampler = resampler_forward_flops_per_image(model.resampler, model.vision, model.decoder.width)
    per_image = vision_flops_per_image(model.vision, num_frozen_vision_layers) + TRAINED * resampler
    return num_tokens * per_token + num_images * per_image


def peak_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 operations a second of a device, or None for one that is not in the table (a CPU)."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)


def model_flops_utilization(
    flops: float, seconds: float, num_devices: int, peak_per_device: float | None
) -> float | None:
    """Return the share of the devices' peak that `flops` in `seconds` is, or None where the peak is not known."""
    return None if peak_per_device is None else flops / (seconds * num_devices * peak_per_device)
