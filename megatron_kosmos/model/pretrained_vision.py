"""Starting the vision tower from a CLIP model that transformers or open_clip saved.

The folder may hold a whole CLIP model or its vision side alone: named as transformers does, with or without the prefix
`vision_model.` (transformers 5 writes none), or as OpenAI and open_clip do (`visual.*`). What does not fit the
configuration is refused before training: transformers itself would build the folder's own sizes, and draw at random
what the folder lacks.

Shape letters: E vision width, P patches (class token included), C channels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_kosmos.config import ConfigError, VisionConfig
from megatron_kosmos.model import open_clip
from megatron_kosmos.model.vision import clip_config
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSING_FILE = "preprocessor_config.json"

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

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError, StrictDataclassError)
"""What the libraries raise at damaged files and at configurations whose fields have wrong types."""

_PATCHES, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"


def pretrained_vision(vision: VisionConfig, folder: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of the CLIP vision tower in `folder` under the names of `CLIPVisionModel`.

    They are for images with `prompt.IMAGE_MEAN` and `IMAGE_STD`; a folder that names others is translated. Raises
    ConfigError, with what to do, where there is no such model, its sizes are others, or weights are missing.
    """
    if not any((folder / name).is_file() for name in (CONFIG_FILE, open_clip.CONFIG_FILE)):
        raise ConfigError(
            f"model.vision.pretrained={folder} is no folder of a CLIP model of transformers or open_clip: it has "
            f"neither {CONFIG_FILE} nor {open_clip.CONFIG_FILE}. Put {CONFIG_FILE} and {WEIGHTS_FILE} there, or "
            f"{open_clip.CONFIG_FILE} and {open_clip.WEIGHTS_FILE}, or set it to null to start from random weights"
        )
    try:
        file = _open_clip_file(folder)
        _check_sizes(vision, folder, file is not None)
        weights, problems = _transformers_tower(folder) if file is None else _open_clip_tower(vision, file)
        mean, std = _normalization(folder, file is not None)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"model.vision.pretrained={folder} can't be read: {error}") from error
    if problems:
        raise ConfigError(
            f"model.vision.pretrained={folder} does not hold the vision tower of its configuration; take the folder of "
            f"a whole CLIP or CLIP vision model:\n  " + "\n  ".join(problems)
        )
    if (mean, std) != (IMAGE_MEAN, IMAGE_STD):
        _renormalize(weights, mean, std)
    return weights


def _open_clip_file(folder: Path) -> Path | None:
    """Return the file of the folder whose names are open_clip's, None where transformers' are to be read."""
    if (folder / WEIGHTS_FILE).is_file():
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            has_visual = any(name.startswith(open_clip.TOWER) for name in weights.keys())  # noqa: SIM118
        return folder / WEIGHTS_FILE if has_visual else None
    return folder / open_clip.WEIGHTS_FILE if (folder / open_clip.WEIGHTS_FILE).is_file() else None


def _open_clip_tower(vision: VisionConfig, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tower's weights, and what of it is missing, left over or of another shape."""
    with safe_open(file, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(open_clip.TOWER)]  # noqa: SIM118
        tower = open_clip.tower_weights({name: stored.get_tensor(name) for name in names})
    weights = {name: tensor.float() for name, tensor in tower.items()}
    with torch.device("meta"):
        expected = {name: one.shape for name, one in CLIPVisionModel(clip_config(vision)).named_parameters()}
    shared = sorted(expected.keys() & weights.keys())
    loading = {
        "missing_keys": expected.keys() - weights.keys(),
        "unexpected_keys": weights.keys() - expected.keys(),
        "mismatched_keys": [
            (name, weights[name].shape, expected[name]) for name in shared if weights[name].shape != expected[name]
        ],
    }
    return weights, _problems(loading)


def _transformers_tower(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tower's weights, and what of it is missing, left over or of another shape."""
    model, loading = CLIPVisionModel.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # only to hear of all of them
        output_loading_info=True,
    )
    return model.state_dict(), _problems(loading)


def _normalization(folder: Path, is_open_clip: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation [C] of the images that the folder's model was trained on.

    Without a word of it they are CLIP's. laion's ViT-L/14 of laion2B, for one, has 0.5 everywhere.
    """
    files = {PREPROCESSING_FILE: ("image_mean", "image_std"), open_clip.CONFIG_FILE: ("mean", "std")}
    first = open_clip.CONFIG_FILE if is_open_clip else PREPROCESSING_FILE
    for name in sorted(files, key=lambda name: name != first):
        if not (folder / name).is_file():
            continue
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings = settings.get("preprocess_cfg", {}) if name == open_clip.CONFIG_FILE else settings
        found = [settings.get(key, clip) for key, clip in zip(files[name], (IMAGE_MEAN, IMAGE_STD), strict=True)]
        mean, std = (tuple(float(value) for value in values) for values in found)
        if len(mean) != len(IMAGE_MEAN) or len(std) != len(IMAGE_STD) or min(std) <= 0:
            raise ValueError(f"{name} must give {' and '.join(files[name])} of three channels, not {found}")
        return mean, std
    return IMAGE_MEAN, IMAGE_STD


def _renormalize(weights: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make weights for images normalized by `mean` and `std` [C] into those for ours, with the same features.

    A pixel x is (x − mean) / std there and y = (x − IMAGE_MEAN) / IMAGE_STD here, so y is scaled, which the patch
    embedding does, and shifted. The shift is the same in every patch: it goes into the positions of all but the class.
    """
    theirs, ours = (torch.tensor(one, dtype=torch.float64) for one in ((mean, std), (IMAGE_MEAN, IMAGE_STD)))
    kernel_ECSS = weights[_PATCHES].double()
    shift_C = (ours[0] - theirs[0]) / theirs[1]
    positions_PE = weights[_POSITIONS].double()
    positions_PE[1:] += torch.einsum("ecij,c->e", kernel_ECSS, shift_C)
    weights[_POSITIONS] = positions_PE.float()
    weights[_PATCHES] = (kernel_ECSS * (ours[1] / theirs[1])[:, None, None]).float()


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


def _check_sizes(vision: VisionConfig, folder: Path, is_open_clip: bool) -> None:
    """Compare the folder's configuration with ours, activation included: a wrong one would go unnoticed for long."""
    if (folder / CONFIG_FILE).is_file() and not (is_open_clip and (folder / open_clip.CONFIG_FILE).is_file()):
        theirs = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    else:
        theirs = open_clip.tower_config(folder)
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
