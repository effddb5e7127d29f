"""Starting the vision tower from a CLIP model that transformers saved.

The folder may hold a whole CLIP model or its vision side alone, with or without the prefix `vision_model.` in the names
(transformers 5 writes none). What does not fit the configuration is refused before a weight is read: transformers
itself would build the folder's own sizes, and draw at random what the folder lacks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_kosmos.config import ConfigError, VisionConfig
from megatron_kosmos.model.vision import clip_config

_FIELDS = {
    "width": "hidden_size",
    "ffn_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "activation": "hidden_act",
}
"""Fields of `VisionConfig` and what transformers calls them."""

_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""What a whole CLIP has besides its vision tower."""
_ROW_NUMBERS = ".position_ids"
"""A buffer that older versions of transformers saved."""


def pretrained_vision(vision: VisionConfig, folder: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of the CLIP vision tower in `folder` under the names of `CLIPVisionModel`.

    Raises ConfigError, with what to do, where there is no such model, its sizes are others, or weights are missing.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.vision.pretrained={folder} is no folder of a transformers CLIP model: it has no config.json. "
            f"Put config.json and model.safetensors there, or set it to null to start from random weights"
        )
    try:
        _check_sizes(vision, folder)
        model, loading = CLIPVisionModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # only to hear of all of them
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.vision.pretrained={folder} can't be read: {error}") from error
    problems = _problems(loading)
    if problems:
        raise ConfigError(
            f"model.vision.pretrained={folder} does not hold the vision tower of its config.json; take the folder of a "
            f"whole CLIP or CLIP vision model:\n  " + "\n  ".join(problems)
        )
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def _problems(loading: Mapping[str, Any]) -> list[str]:
    """Return every name that is missing or left over, and every shape that differs."""
    misshaped = [
        f"differs in shape: {name} is {list(found)}, the model wants {list(wanted)}"
        for name, found, wanted in sorted(loading["mismatched_keys"])
    ]
    left_over = (name for name in sorted(loading["unexpected_keys"]) if not name.startswith(_OTHER_PARTS))
    return [
        *(f"missing: {name}" for name in sorted(loading["missing_keys"])),
        *(f"left over: {name}" for name in left_over if not name.endswith(_ROW_NUMBERS)),
        *misshaped,
    ]


def _check_sizes(vision: VisionConfig, folder: Path) -> None:
    """Compare the folder's configuration with ours, activation included: a wrong one would go unnoticed for long."""
    theirs = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    ours = clip_config(vision)
    differing = [
        f"model.vision.{field}={getattr(ours, name)}, the folder has {getattr(theirs, name)}"
        for field, name in _FIELDS.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if theirs.layer_norm_eps != ours.layer_norm_eps:
        differing.append(f"LayerNorm epsilon {ours.layer_norm_eps} is fixed, the folder has {theirs.layer_norm_eps}")
    if differing:
        raise ConfigError(f"model.vision.pretrained={folder} is another model: " + "; ".join(differing))
