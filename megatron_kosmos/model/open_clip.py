"""open_clip's names and settings of CLIP's vision tower, OpenAI's own names (`visual.*`) among them.

Shape letters: E vision width, P patches (class token included).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TOWER = "visual."
"""What the tower's names begin with; all others are the text side's."""

_LAYER_NORM_EPSILON = 1e-5
"""torch's default, which open_clip takes."""
_POOLED = f"{TOWER}proj"
"""Projects the pooled features, which a KOSMOS doesn't read."""

_RENAMES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
_FUSED = re.compile(r"(.*)\.in_proj_(weight|bias)")
"""torch's nn.MultiheadAttention has queries, keys and values in one matrix [3 E, E] or vector [3 E]."""

_SIZES = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_OF_POOLING_OR_TRAINING = {
    *("patch_dropout", "pool_type", "output_tokens", "final_ln_after_pool"),
    *("attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj"),
}
"""Settings of the tower that change no patch's features; others must be off."""


def tower_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tower's tensors under the names of transformers' `CLIPVisionModel`; views where they are cut."""
    tower: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(TOWER) or name == _POOLED:
            continue
        renamed = name.removeprefix(TOWER)
        for pattern, replacement in _RENAMES:
            renamed = re.sub(pattern, replacement, renamed)
        fused = _FUSED.fullmatch(renamed)
        if fused is None:
            tower[renamed] = tensor
        else:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            tower |= {f"{fused[1]}.{part}.{fused[2]}": rows for part, rows in parts}
    return tower


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the object in the folder's `open_clip_config.json`. Raises OSError, or ValueError where there is none."""
    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("model_cfg"), dict):
        raise ValueError(f"{CONFIG_FILE} has no object model_cfg")
    return settings


def tower_config(folder: Path) -> CLIPVisionConfig:
    """Translate `open_clip_config.json` to transformers' configuration.

    Raises OSError, or ValueError where it is unreadable or of another kind of tower, with the settings that make it so.
    """
    model = read_settings(folder)["model_cfg"]
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict) or not {"width", "layers", "patch_size", "image_size"} <= vision.keys():
        raise ValueError(f"{CONFIG_FILE} needs model_cfg.vision_cfg with width, layers, patch_size and image_size")
    others = {name: value for name, value in vision.items() if name not in _SIZES | _OF_POOLING_OR_TRAINING}
    foreign = [f"{name}={value!r}" for name, value in others.items() if value and value != "learnable"]
    if foreign:
        raise ValueError(f"{CONFIG_FILE} describes another kind of tower: vision_cfg has {', '.join(foreign)}")
    sizes = {"head_width": 64, "mlp_ratio": 4.0, **vision}
    wrong = [f"{name}={sizes[name]!r}" for name in sorted(_SIZES) if not isinstance(sizes[name], int | float)]
    if wrong:
        raise ValueError(f"{CONFIG_FILE} describes no square vision transformer: vision_cfg has {', '.join(wrong)}")
    return CLIPVisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=int(sizes["width"] * sizes["mlp_ratio"]),
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["width"] // sizes["head_width"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu",  # open_clip's default is gelu
        layer_norm_eps=_LAYER_NORM_EPSILON,
    )
