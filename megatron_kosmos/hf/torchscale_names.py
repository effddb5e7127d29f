"""Names and settings of a Kosmos-X model: torchscale's decoder, CLIP's tower and flamingo-pytorch's resampler.

Kosmos-X's README keeps them as `decoder`, `clip_model`, `perceive` and `image_proj`. What torchscale and CLIP call
their parts below those, `KosmosForConditionalGeneration` calls the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kosmos.config import DecoderConfig
from megatron_kosmos.hf.name_map import Entry, NameMapError, Shape

FIRST_ROW = 2
"""Row of torchscale's position embedding that the first token takes."""
DECODER, TOWER, RESAMPLER = "decoder.", "clip_model.", "perceive."
EMBEDDING = "decoder.embed_tokens.weight"
POSITIONS, FRAMES, OUTPUT = (
    "decoder.embed_positions.weight",
    "perceive.media_pos_emb",
    "decoder.output_projection.weight",
)

_BEGINNINGS = (
    ("text_model.model.", DECODER),
    ("text_model.lm_head.", "decoder.output_projection."),
    ("vision_tower.", TOWER),
    ("resampler.projection.", "image_proj."),
    ("resampler.frame_embedding", FRAMES),
    ("resampler.", RESAMPLER),
)
_PERCEIVER_LAYER = {
    "attention.media_norm": "0.norm_media",
    "attention.latents_norm": "0.norm_latents",
    "attention.to_q": "0.to_q",
    "attention.to_kv": "0.to_kv",
    "attention.to_out": "0.to_out",
    "ffn.norm": "1.0",
    "ffn.fc1": "1.1",
    "ffn.fc2": "1.3",
}
_TWICE = {
    "embed.weight": EMBEDDING,
    "embed_positions.weight": POSITIONS,
    "output_projection.weight": OUTPUT,
}
"""Modules that Kosmos-X holds itself and hands to the decoder, so that they are saved under both names."""
_BUFFERS = re.compile(r"\.(xpos\.scale|position_ids|version)$")

FIELDS = {
    "vocab_size": "vocab_size",
    "decoder_embed_dim": "width",
    "decoder_layers": "num_layers",
    "decoder_ffn_embed_dim": "ffn_width",
    "decoder_attention_heads": "num_heads",
    "layernorm_eps": "layer_norm_epsilon",
    "share_decoder_input_output_embed": "tie_embeddings",
    "xpos_rel_pos": "xpos",
    "no_scale_embedding": "scale_embeddings",
}
"""Fields of torchscale's DecoderConfig and ours that say the same; no_scale_embedding says its opposite."""
DEFAULTS: Mapping[str, Any] = {
    "decoder_embed_dim": 768,
    "decoder_layers": 12,
    "decoder_ffn_embed_dim": 3072,
    "decoder_attention_heads": 12,
    "layernorm_eps": 1e-5,
    "share_decoder_input_output_embed": False,
    "xpos_rel_pos": False,
    "no_scale_embedding": True,
}
"""torchscale 0.3.0's, of those fields; vocab_size has none."""
FIXED: Mapping[str, Any] = {
    "activation_fn": "gelu",
    "decoder_normalize_before": True,
    "subln": True,
    "deepnorm": False,
    "multiway": False,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "rel_pos_buckets": 0,
    "no_output_layer": False,
    "xpos_scale_base": 512,
}
"""What else the decoder must be; also torchscale's defaults."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the exported model is in a torchscale state dict."""

    name: str
    shape: Shape

    def take(self, tensor: Tensor) -> Tensor:
        """Return the part of torchscale's tensor that the model has."""
        if self.name == POSITIONS:
            return tensor[FIRST_ROW:]
        return tensor[0, 0] if self.name == FRAMES else tensor  # a picture is a single frame


def places(entry: Entry, num_frames: int) -> tuple[Place, ...]:
    """Return the places of an entry's exported tensors, in order; flamingo's embedding has `num_frames` rows."""
    return tuple(_place(*named, num_frames) for named in zip(entry.hf_names, entry.hf_shapes, strict=True))


def _place(hf_name: str, shape: Shape, num_frames: int) -> Place:
    name = torchscale_name(hf_name)
    if name == POSITIONS:
        return Place(name, (shape[0] + FIRST_ROW, *shape[1:]))
    return Place(name, (num_frames, 1, *shape) if name == FRAMES else shape)


def torchscale_name(hf_name: str) -> str:
    """Return Kosmos-X's name of a parameter of `KosmosForConditionalGeneration`."""
    ours, theirs = next(pair for pair in _BEGINNINGS if hf_name.startswith(pair[0]))
    name = theirs + hf_name.removeprefix(ours)
    for part, number in _PERCEIVER_LAYER.items():
        name = re.sub(rf"^(perceive\.layers\.\d+\.){re.escape(part)}\.", rf"\g<1>{number}.", name)
    return name


def normalized(state: Mapping[str, Tensor], is_tied: bool) -> dict[str, Tensor]:
    """Return a state dict with each tensor under one name.

    Takes the decoder's names with and without `decoder.`, and CLIP's with and without `vision_model.`; leaves out
    buffers, and copies of what the decoder has too. Raises NameMapError where copies differ: then it is not known
    which of them the model computes with.
    """
    tensors: dict[str, Tensor] = {}
    has_prefix = any(name.startswith(DECODER) for name in state)
    for name, tensor in state.items():
        if _BUFFERS.search(name):
            continue
        if not has_prefix and name.startswith(("layers.", "layer_norm.", "embed_tokens.")):
            name = DECODER + name  # noqa: PLW2901
        tensors[name.replace(f"{TOWER}vision_model.", TOWER)] = tensor
    copies = _TWICE | ({OUTPUT: EMBEDDING} if is_tied else {})
    differing = []
    for copy, original in copies.items():
        if copy not in tensors:
            continue
        tensor = tensors.pop(copy)
        if not torch.equal(tensor, tensors.setdefault(original, tensor)):
            differing.append(f"{copy} is not {original}, of which it is a copy in this model")
    if differing:
        raise NameMapError("the state dict has two of a kind:\n  " + "\n  ".join(differing))
    return tensors


def differences(settings: Mapping[str, Any], decoder: DecoderConfig) -> list[str]:
    """Return what of torchscale's DecoderConfig, as keyword arguments, is not what the decoder is."""
    problems = [
        f"{name}={settings[name]!r}: this decoder has {wanted!r}"
        for name, wanted in FIXED.items()
        if settings.get(name, wanted) != wanted
    ]
    for theirs, ours in FIELDS.items():
        wanted = getattr(decoder, ours)
        wanted = not wanted if theirs == "no_scale_embedding" else wanted
        given = settings.get(theirs, DEFAULTS.get(theirs, wanted))
        if given != wanted:
            default = "" if theirs in settings else " (torchscale's default)"
            problems.append(f"{theirs}={given!r}{default}: model.decoder.{ours} is {getattr(decoder, ours)!r}")
    return problems
