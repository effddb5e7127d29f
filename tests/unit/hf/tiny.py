"""Small KOSMOS models with weights that hide nothing, and prompts for them."""

from typing import Any

import torch
from torch import Tensor

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration

VOCAB, LATENTS, SIDE, MAX_LENGTH = 61, 3, 16, 48

VARIANTS: dict[str, dict[str, Any]] = {
    "xpos": {},
    "multi_query": {"num_key_value_heads": 1},
    "grouped_learned": {"num_key_value_heads": 2, "positions": "learned"},
    "tied_learned_only": {"xpos": False, "positions": "learned", "tie_word_embeddings": True},
    "tied_xpos": {"tie_word_embeddings": True},
    "modern": {"num_key_value_heads": 1, "query_key_norm": True},
    "kosmos2": {
        "xpos": False,
        "positions": "sinusoidal",
        "scale_embeddings": True,
        "vision_features": "normalized",
        "resampler": "cross_attention",
        "resampler_num_heads": 4,
    },
    "kosmos2_mixed_with_kosmos1": {
        "positions": "sinusoidal",
        "vision_features": "normalized",
        "query_key_norm": True,
        "scale_embeddings": True,
    },
}


def tiny_config(**changes: Any) -> KosmosConfig:
    """Return a configuration of a few thousand parameters, without dropout."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "resampler_depth": 2,
        "resampler_num_heads": 2,
        "resampler_head_size": 8,
        "resampler_ffn_multiplier": 2,
        "num_image_tokens": LATENTS,
        "vision_config": {
            "dtype": "float32",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
    }
    return KosmosConfig(**(values | changes))


def tiny_model(**changes: Any) -> KosmosForConditionalGeneration:
    """Return a model in evaluation mode whose every parameter matters: no norm is at its fresh 1 and 0."""
    torch.manual_seed(5)
    model = KosmosForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith(("norm.weight", "ln.weight"))
            is_input = "embed_tokens" in name or "resampler.projection" in name
            # A tied model with large embeddings only repeats its last token.
            std = (0.1 if model.config.tie_word_embeddings else 1.0) if is_input else 0.25
            if "embed_tokens" in name and model.config.scale_embeddings:
                std /= model.config.hidden_size**0.5
            parameter.normal_(mean=0.7 if is_scale else 0.0, std=std)
    return model


def prompt(num_images: int, num_text: int, seed: int) -> dict[str, Tensor]:
    """Return one row: `<s>`, the images one after another with a word between them, and text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(7, VOCAB, (num_images + num_text,), generator=generator).tolist()
    ids, is_slot = [1], [0]
    for image in range(num_images):
        ids += [4, *[0] * LATENTS, 5, words[image]]
        is_slot += [0, *[1] * LATENTS, 0, 0]
    ids += words[num_images:]
    is_slot += [0] * num_text
    row = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "image_embeds_position_mask": torch.tensor([is_slot]),
    }
    if num_images:
        row["pixel_values"] = torch.randn(num_images, 3, SIDE, SIDE, generator=generator)
    return row


def left_padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the rows as one batch, shorter ones padded on the left, images in row order."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        key: torch.cat([torch.nn.functional.pad(row[key], (longest - row[key].shape[1], 0)) for row in rows])
        for key in ("input_ids", "attention_mask", "image_embeds_position_mask")
    }
    pictures = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return batch | ({"pixel_values": torch.cat(pictures)} if pictures else {})
