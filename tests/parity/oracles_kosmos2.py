"""transformers' Kosmos2ForConditionalGeneration, and how its weights are named here."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

from megatron_kosmos.config import ModelConfig
from tests.parity.oracles import DecoderNames, randomized

PAD = 1
"""transformers' positions start behind this id: the first token takes row 2, as here."""


def kosmos2(model: ModelConfig, seed: int) -> Kosmos2ForConditionalGeneration:
    """Return transformers' model of the same sizes in fp64, no parameter of which is at a trivial value."""
    decoder, vision = model.decoder, model.vision
    config = Kosmos2Config(
        text_config={
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_sequence_length,
            "embed_dim": decoder.width,
            "layers": decoder.num_layers,
            "ffn_dim": decoder.ffn_width,
            "attention_heads": decoder.num_heads,
            "layer_norm_eps": decoder.layer_norm_epsilon,
            "pad_token_id": PAD,
        },
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.ffn_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
        },
        latent_query_num=model.resampler.num_latents,
        attn_implementation="eager",
    )
    oracle: Kosmos2ForConditionalGeneration = randomized(Kosmos2ForConditionalGeneration(config).double().eval(), seed)
    return oracle


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Run transformers' model in `dtype`: in fp64 it cannot make its mask, a tensor of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Kosmos2Names:
    """Renames transformers' whole tensors, weights and gradients alike, to this package's global names."""

    model: ModelConfig
    padding: float
    """What the rows of ids that don't exist hold: anything in weights, zero in gradients."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the renamed tensors. Every one is used."""
        left = {name: tensor for name, tensor in tensors.items() if name != "text_model.lm_head.weight"}
        text = {name: left.pop(name) for name in list(left) if name.startswith("text_model.model.")}
        # The text model has torchscale's names.
        renamed = DecoderNames(self.model.decoder, self.padding)(
            {name.removeprefix("text_model.model."): tensor for name, tensor in text.items()}
        )
        for name, tensor in left.items():
            renamed[_vision_side(name)] = tensor
        return renamed

    def of_projection(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the renamed tensors of a Kosmos2ImageToTextProjection alone."""
        return {_vision_side(f"image_to_text_projection.{name}"): tensor for name, tensor in tensors.items()}


def _vision_side(name: str) -> str:
    """Return our name of a parameter of the vision model or of the projection."""
    projection = "image_to_text_projection."
    if name.startswith("vision_model.model."):
        return name.replace("vision_model.model.", "vision_tower.")
    if name == projection + "latent_query":
        return "resampler.latents"
    renamed, count = re.subn(rf"^{projection}dense\.", "resampler.projection.", name)
    renamed, more = re.subn(rf"^{projection}x_attn\.", "resampler.attention.", renamed)
    assert count + more == 1, f"unused: {name}"
    return renamed
