"""The formulas of flops.py against torch's own counter on models that we did not write."""

import pytest
import torch
from flamingo_pytorch import PerceiverResampler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2Config, Kosmos2TextConfig
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection, Kosmos2TextForCausalLM

from megatron_kosmos.config import CrossAttentionConfig, DecoderConfig, PerceiverConfig, VisionConfig
from megatron_kosmos.observability.flops import (
    FORWARD_ONLY,
    WHOLE,
    Backward,
    decoder_layer_products,
    feature_products,
    model_flops_utilization,
    output_products,
    patch_embedding_products,
    peak_flops,
    resampler_products,
    vision_layer_products,
)

DECODER = DecoderConfig(
    num_layers=2, width=64, ffn_width=192, num_heads=4, vocab_size=500, max_sequence_length=48, attention_dropout=0.0
)
VISION = VisionConfig(width=32, ffn_width=96, num_layers=3, num_heads=4, image_size=32, patch_size=8)
RESAMPLER = PerceiverConfig(kind="perceiver", depth=2, num_latents=6, num_heads=4, head_size=8)
CROSS_ATTENTION = CrossAttentionConfig(kind="cross_attention", num_latents=6, num_heads=4)


def clip_tower(trained: set[int], *, trains_embedding: bool) -> CLIPVisionModel:
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
    tower.requires_grad_(False)
    tower.embeddings.requires_grad_(trains_embedding)
    for number in trained:
        tower.encoder.layers[number].requires_grad_(True)
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
    layers = DECODER.num_layers * decoder_layer_products(DECODER, length).training(WHOLE)
    counted = (layers + output_products(DECODER).training(WHOLE)) * num_sequences * length
    assert counted == pytest.approx(causal, rel=1e-9)


def test_query_groups_save_key_and_value_projections_only() -> None:
    full, grouped = DECODER, DECODER.model_copy(update={"num_query_groups": 1})
    saved = decoder_layer_products(full, 48).forward - decoder_layer_products(grouped, 48).forward
    assert saved == 2 * DECODER.width * 2 * (DECODER.width - DECODER.head_size)


def tower_flops(trained: set[int], *, trains_embedding: bool) -> int:
    """What the formulas say of a tower of which the layers `trained`, and its embedding or not, are trained."""
    of_weights = Backward(of_input=False, of_weights=trains_embedding)
    total, is_reached = patch_embedding_products(VISION).training(of_weights), trains_embedding
    for number in range(VISION.num_layers):
        is_reached = is_reached or number in trained
        total += vision_layer_products(VISION).training(Backward(is_reached, number in trained))
    return total


@pytest.mark.parametrize(
    "trained, trains_embedding",
    [({0, 1, 2}, True), ({1, 2}, False), ({2}, False), ({0}, False), ({1}, False), (set(), True), (set(), False)],
    ids=["all", "upper two", "last", "first", "middle", "embedding", "none"],
)
def test_vision_tower_costs_what_torch_counts_whatever_is_frozen(trained: set[int], trains_embedding: bool) -> None:
    num_images = 2
    tower = clip_tower(trained, trains_embedding=trains_embedding)
    with FlopCounterMode(display=False) as counter:
        patches: Tensor = tower(torch.randn(num_images, 3, VISION.image_size, VISION.image_size)).last_hidden_state
        if patches.requires_grad:
            patches.sum().backward()

    counted = num_images * tower_flops(trained, trains_embedding=trains_embedding)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-9)


RESAMPLING = {"frozen": FORWARD_ONLY, "trained": WHOLE, "gradient goes through": Backward(True, False)}


def train_resampler(resampler: nn.Module, of_images: Tensor, case: str) -> int:
    """Return what torch counts where the resampler is trained or not, and what is below it or not."""
    resampler.requires_grad_(case == "trained")
    of_images.requires_grad_(case == "gradient goes through")
    with FlopCounterMode(display=False) as counter:
        output = resampler(of_images)
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", RESAMPLING)
def test_resampler_costs_what_torch_counts(case: str) -> None:
    num_images = 2
    perceiver = PerceiverResampler(
        dim=VISION.width,
        depth=RESAMPLER.depth,
        dim_head=RESAMPLER.head_size,
        heads=RESAMPLER.num_heads,
        num_latents=RESAMPLER.num_latents,
        ff_mult=RESAMPLER.ffn_multiplier,
    )
    whole = nn.Sequential(perceiver, nn.Linear(VISION.width, DECODER.width, bias=False))
    counted = train_resampler(whole, torch.randn(num_images, 1, VISION.num_patches, VISION.width), case)
    expected = num_images * resampler_products(RESAMPLER, VISION, DECODER.width).training(RESAMPLING[case])
    assert feature_products(RESAMPLER, VISION, DECODER.width).forward == 0
    inner = RESAMPLER.num_heads * RESAMPLER.head_size
    expected -= num_images * unneeded(case, RESAMPLER.num_latents, VISION.width, inner)
    assert counted == pytest.approx(expected, rel=1e-9)


def unneeded(case: str, num_latents: int, width: int, inner: int) -> int:
    """Operations less where the first queries come from latents that are frozen: they need no gradient."""
    if case != "gradient goes through":
        return 0
    return 2 * num_latents * width * inner + 2 * num_latents * (VISION.num_patches + num_latents) * inner


@pytest.mark.parametrize("case", RESAMPLING)
def test_cross_attention_resampler_costs_what_torch_counts(case: str) -> None:
    num_images = 2
    theirs = Kosmos2Config(
        text_config={"embed_dim": DECODER.width, "attention_heads": CROSS_ATTENTION.num_heads},
        vision_config={"hidden_size": VISION.width},
        latent_query_num=CROSS_ATTENTION.num_latents,
    )
    theirs._attn_implementation = "eager"
    whole = Kosmos2ImageToTextProjection(theirs)
    counted = train_resampler(whole, torch.randn(num_images, VISION.num_patches, VISION.width), case)
    backward = RESAMPLING[case]
    of_features = Backward(case == "gradient goes through", backward.of_weights)
    expected = feature_products(CROSS_ATTENTION, VISION, DECODER.width).training(of_features)
    expected += resampler_products(CROSS_ATTENTION, VISION, DECODER.width).training(backward)
    expected -= unneeded(case, CROSS_ATTENTION.num_latents, DECODER.width, DECODER.width)
    assert counted == pytest.approx(num_images * expected, rel=1e-9)


def test_a_24_layer_decoder_costs_about_six_operations_a_parameter_and_token() -> None:
    paper = DecoderConfig(
        num_layers=24, width=2048, ffn_width=8192, num_heads=32, vocab_size=64007, max_sequence_length=2048
    )
    matrices = 24 * (4 * 2048**2 + 2 * 2048 * 8192) + 64007 * 2048
    attention = 24 * 6 * 2049 * 2048
    layers, output = decoder_layer_products(paper, 2048), output_products(paper)
    assert 24 * layers.training(WHOLE) + output.training(WHOLE) == 6 * matrices + attention


@pytest.mark.parametrize(
    "name, expected",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
)
def test_peak_is_known_by_device_name(name: str, expected: float | None) -> None:
    assert peak_flops(name) == expected


def test_utilization_is_null_without_a_peak() -> None:
    assert model_flops_utilization(8e12, seconds=2.0, num_devices=4, peak_per_device=2e12) == 0.5
    assert model_flops_utilization(8e12, seconds=2.0, num_devices=4, peak_per_device=None) is None
