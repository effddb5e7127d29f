"""The presets shrunk to test size: every switch is the preset's, every size the tiny model's."""

from pathlib import Path
from typing import Any

import yaml

from tests.distributed.tiny import BASE

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = ("kosmos1", "kosmos_x", "kosmos2", "modern", "kosmos_13b")
SIZES = {"num_layers", "width", "ffn_width", "num_heads", "vocab_size", "vocab_multiple", "max_sequence_length"}
VISION_SIZES = {"width", "ffn_width", "num_layers", "num_heads", "image_size", "patch_size"}


def shrunk(name: str) -> dict[str, Any]:
    """Return the changes that make the tiny run a small `name`, without dropout and with AdamW.

    Grouped queries become multi-query, the strongest case: four query heads on one key head.
    """
    preset = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    decoder, vision, resampler = (preset["model"][part] for part in ("decoder", "vision", "resampler"))
    changes: dict[str, Any] = {
        f"model__decoder__{key}": value for key, value in decoder.items() if key not in SIZES | {"num_query_groups"}
    }
    changes |= {"model__decoder__dropout": 0.0, "model__decoder__attention_dropout": 0.0}
    changes["optimizer__learning_rate"] = 1e-3  # at 1e-2 Adam turns rounding into 1e-6 of the norm within three steps
    if decoder.get("num_query_groups") is not None:
        changes["model__decoder__num_query_groups"] = 1
    for key, value in vision.items():
        if key not in VISION_SIZES | {"pretrained"}:
            changes[f"model__vision__{key}"] = value
    small = BASE["model"]["resampler"]
    if resampler["kind"] == "cross_attention":
        small = {"kind": "cross_attention", "num_latents": small["num_latents"], "num_heads": 4, "attention_dropout": 0}
    changes["model__resampler"] = small
    changes["optimizer__groups"] = [
        group | {"parameters": [pattern.replace(last_layer(vision), ".2.") for pattern in group["parameters"]]}
        for group in preset["optimizer"].get("groups", ())
    ]
    return changes


def last_layer(vision: dict[str, Any]) -> str:
    return f".{vision['num_layers'] - 1}."


def pattern_of(name: str) -> str:
    """Return the microbatches of a step: documents are masked where the preset masks them."""
    preset = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return "tddm" if preset["data"].get("document_mask") else "timm"
