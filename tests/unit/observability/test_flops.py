"""The formulas of flops.py against torch's own counter on models that we did not write."""

import pytest
import torch
from flamingo_pytorch import PerceiverResampler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2Config, Kosmos2TextConfig
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection, Kosmos2TextForCausalLM

from megatron_kosmos.config import CrossAttentionConfig, DecoderConfig, ModelConfig, PerceiverConfig, VisionConfig
from megatron_kosmos.observability.flops import (
    TRAINED,
    decoder_forward_flops_per_token,
    model_flops_utilization,
    peak_flops,
    resampler_forward_flops_per_image,
    training_flops,
    vision_flops_per_image,
)

DECODER = DecoderConfig(
    num_layers=2, width=64, ffn_width=192, num_heads=4, vocab_size=500, max_sequence_length=48, attention_dropout=0.0
)
VISION = VisionConfig(width=32, ffn_width=96, num_layers=3, num_heads=4, image_size=32, patch_size=8)
RESAMPLER = PerceiverConfig(kind="perceiver", depth=2, num_latents=6, num_heads=4, head_size=8)
MODEL = ModelConfig(decoder=DECODER, vision=VISION, resampler=RESAMPLER)


def clip_tower(frozen_layers: int) -> CLIPVisionModel:
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=VISION.width,
            intermediate_size=VISION.ffn_width,
            num_hidden_layers=VISION.num_layers,
            num_attention_heads=VISION.num_heads,
            image_size=VISION.image_size,
            patch_size=VISION.patch_size,
            attn_implementation="eager",
        )
    )
    trained = tower.encoder.layers[frozen_layers:] if frozen_layers else tower
    tower.requires_grad_(False)
    trained.requires_grad_(True)
    return tower


def test_decoder_and_vocabulary_projection_cost_what_torch_counts_with_half_of_the_attention() -> None:
    num_sequences, length = 3, 48
    decoder = Kosmos2TextForCausalLM(
        Kosmos2TextConfig(
            vocab_size=DECODER.vocab_size,
            max_position_embeddings=length,
            embed_dim=DECODER.width,
            layers=DECODER.num_layers,
            ffn_dim=DECODER.ffn_width,
            attention_heads=DECODER.num_heads,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter:
        logits = decoder(torch.randint(3, DECODER.vocab_size, (num_sequences, length)), use_cache=False).logits
        logits.sum().backward()

    in_full = counter.get_total_flops()
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]  # eager attention alone multiplies in batches
    causal = in_full - attention + attention * (length + 1) / (2 * length)
    counted = TRAINED * decoder_forward_flops_per_token(DECODER, length) * num_sequences * length
    assert counted == pytest.approx(causal, rel=1e-9)


def test_query_groups_save_key_and_value_projections_only() -> None:
    grouped = DECODER.model_copy(update={"num_query_groups": 1})
    saved = decoder_forward_flops_per_token(DECODER, 48) - decoder_forward_flops_per_token(grouped, 48)
    assert saved == DECODER.num_layers * 2 * DECODER.width * 2 * (DECODER.width - DECODER.head_size)


@pytest.mark.parametrize("frozen_layers", [0, 1, 2, 3])
def test_vision_tower_costs_what_torch_counts_whatever_is_frozen(frozen_layers: int) -> None:
    num_images = 2
    tower = clip_tower(frozen_layers)
    with FlopCounterMode(display=False) as counter:
        patches: Tensor = tower(torch.randn(num_images, 3, VISION.image_size, VISION.image_size)).last_hidden_state
        if patches.requires_grad:
            patches.sum().backward()

    assert num_images * vision_flops_per_image(VISION, frozen_layers) == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )


def test_resampler_costs_what_torch_counts() -> None:
    num_images = 2
    resampler = PerceiverResampler(
        dim=VISION.width,
        depth=RESAMPLER.depth,
        dim_head=RESAMPLER.head_size,
        heads=RESAMPLER.num_heads,
        num_latents=RESAMPLER.num_latents,
        ff_mult=RESAMPLER.ffn_multiplier,
    )
    projection = torch.nn.Linear(VISION.width, DECODER.width, bias=False)
    with FlopCounterMode(display=False) as counter:
        projection(resampler(torch.randn(num_images, 1, VISION.num_patches, VISION.width)))

    counted = num_images * resampler_forward_flops_per_image(RESAMPLER, VISION, DECODER.width)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_cross_attention_resampler_costs_what_torch_counts() -> None:
    num_images, config = 2, CrossAttentionConfig(kind="cross_attention", num_latents=6, num_heads=4)
    theirs = Kosmos2Config(
        text_config={"embed_dim": DECODER.width, "attention_heads": 4},
        vision_config={"hidden_size": VISION.width},
        latent_query_num=6,
    )
    theirs._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        Kosmos2ImageToTextProjection(theirs)(torch.randn(num_images, VISION.num_patches, VISION.width))

    counted = num_images * resampler_forward_flops_per_image(config, VISION, DECODER.width)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_step_is_the_sum_of_its_tokens_and_images() -> None:
    text_only = training_flops(MODEL, sequence_length=48, num_tokens=96, num_images=0)
    assert text_only == 96 * 3 * decoder_forward_flops_per_token(DECODER, 48)
    per_image = vision_flops_per_image(VISION, 0) + 3 * resampler_forward_flops_per_image(RESAMPLER, VISION, 64)
    assert training_flops(MODEL, 48, 96, 5) == text_only + 5 * per_image


def test_a_24_layer_decoder_costs_about_six_operations_a_parameter_and_token() -> None:
    paper = DecoderConfig(
        num_layers=24, width=2048, ffn_width=8192, num_heads=32, vocab_size=64007, max_sequence_length=2048
    )
    matrices = 24 * (4 * 2048**2 + 2 * 2048 * 8192) + 64007 * 2048
    attention = 24 * 6 * 2049 * 2048
    assert 3 * decoder_forward_flops_per_token(paper, 2048) == 6 * matrices + attention


@pytest.mark.parametrize(
    "name, expected",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
)
def test_peak_is_known_by_device_name(name: str, expected: float | None) -> None:
    assert peak_flops(name) == expected


def test_utilization_is_null_without_a_peak() -> None:
    assert model_flops_utilization(8e12, seconds=2.0, num_devices=4, peak_per_device=2e12) == 0.5
    assert model_flops_utilization(8e12, seconds=2.0, num_devices=4, peak_per_device=None) is None
