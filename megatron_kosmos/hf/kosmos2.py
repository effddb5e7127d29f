"""transformers' own Kosmos-2: what of a training configuration it can be, and what its parameters are called.

Its text model names everything as `KosmosForConditionalGeneration` does; only the picture's side has other names.
"""

from transformers import (
    GenerationConfig,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.config import ModelConfig
from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

PAD_ID = 1
"""Its positions are counted from the id of padding, and the released model, as ours, has the first in row 2."""
FIRST_ROW = PAD_ID + 1
VISION_EPSILON = 1e-5
NUM_PATCH_TOKENS = 1024
"""Location tokens of the processor, the default."""

_PICTURE_NAMES = (
    ("vision_tower.", "vision_model.model."),
    ("resampler.projection.", "image_to_text_projection.dense."),
    ("resampler.attention.", "image_to_text_projection.x_attn."),
    ("resampler.latents", "image_to_text_projection.latent_query"),
)
"""Beginnings of our names, and transformers' in their place."""


class FormatError(ValueError):
    """A model that a format cannot hold; the message lists every field that does not fit."""


def kosmos2_name(name: str) -> str:
    """Return transformers' name of a parameter of `KosmosForConditionalGeneration`."""
    for ours, theirs in _PICTURE_NAMES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def kosmos2_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Kosmos2Config:
    """Translate a training configuration. Raises FormatError with every field that transformers' class cannot have."""
    _refuse("this model is no stock Kosmos-2; export it without --format kosmos2", _unfit_settings(model, tokenizer))
    decoder, vision = model.decoder, model.vision
    ids = {role: getattr(tokenizer, role) for role in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return Kosmos2Config(
        architectures=[Kosmos2ForConditionalGeneration.__name__],
        text_config={
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_sequence_length,
            "embed_dim": decoder.width,
            "layers": decoder.num_layers,
            "ffn_dim": decoder.ffn_width,
            "attention_heads": decoder.num_heads,
            "dropout": decoder.dropout,
            "attention_dropout": decoder.attention_dropout,
            "layer_norm_eps": decoder.layer_norm_epsilon,
            "scale_embedding": decoder.scale_embeddings,
            "tie_word_embeddings": decoder.tie_embeddings,
            **ids,
        },
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.ffn_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
            "layer_norm_eps": VISION_EPSILON,
        },
        latent_query_num=model.resampler.num_latents,
        tie_word_embeddings=decoder.tie_embeddings,
    )


def as_kosmos_config(config: Kosmos2Config) -> KosmosConfig:
    """Return the same model as a configuration of ours. Raises FormatError with every field that ours cannot have."""
    text, vision = config.text_config, config.vision_config
    _refuse("this Kosmos-2 cannot be trained here", _unfit_fields(config))
    return KosmosConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.embed_dim,
        intermediate_size=text.ffn_dim,
        num_hidden_layers=text.layers,
        num_attention_heads=text.attention_heads,
        num_key_value_heads=text.attention_heads,
        max_position_embeddings=text.max_position_embeddings,
        xpos=False,
        positions="sinusoidal",
        scale_embeddings=text.scale_embedding,
        dropout=text.dropout,
        attention_dropout=text.attention_dropout,
        layer_norm_eps=text.layer_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.hidden_act,
        },
        vision_features="normalized",
        resampler="cross_attention",
        resampler_num_heads=text.attention_heads,
        resampler_attention_dropout=text.attention_dropout,
        num_image_tokens=config.latent_query_num,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )


def kosmos2_processor(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Kosmos2Processor:
    """Return transformers' processor. Raises FormatError where it would give tokens ids that the model has not."""
    side = model.vision.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    tokenizer.model_max_length = model.decoder.max_sequence_length
    tokenizer.padding_side = "left"
    tokenizer.split_special_tokens = False  # the processor writes its markers into the text
    processor = Kosmos2Processor(image_processor, tokenizer, NUM_PATCH_TOKENS)
    vocab_size = model.decoder.vocab_size
    outside = [token for token in processor.tag_tokens if tokenizer.convert_tokens_to_ids(token) >= vocab_size]
    if outside or len(tokenizer) > vocab_size:
        raise FormatError(
            f"the vocabulary of {vocab_size} has no room for what Kosmos2Processor needs: {len(tokenizer)} tokens with "
            f"{', '.join(outside[:4]) or 'the location tokens'} and {NUM_PATCH_TOKENS} location tokens. Train with a "
            f"tokenizer that has them (`kosmos tokenizer import` of Kosmos-2's), or export without --format kosmos2"
        )
    return processor


def kosmos2_generation_config(config: Kosmos2Config, max_new_tokens: int) -> GenerationConfig:
    """Return defaults for `generate()`."""
    text = config.text_config
    return GenerationConfig(
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        max_new_tokens=max_new_tokens,
    )


def _unfit_settings(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    decoder, vision, resampler = model.decoder, model.vision, model.resampler
    wanted: tuple[tuple[str, object, object], ...] = (
        ("model.decoder.xpos", decoder.xpos, False),
        ("model.decoder.positions", decoder.positions, "sinusoidal"),
        ("model.decoder.query_key_norm", decoder.query_key_norm, False),
        ("model.decoder.num_query_groups", decoder.num_query_groups or decoder.num_heads, decoder.num_heads),
        ("model.vision.features", vision.features, "normalized"),
        ("model.resampler.kind", resampler.kind, "cross_attention"),
        ("model.resampler.num_heads", resampler.num_heads, decoder.num_heads),
        ("the tokenizer's id of padding", tokenizer.pad_token_id, PAD_ID),
    )
    return [f"{field} is {value}, Kosmos-2 has {stock}" for field, value, stock in wanted if value != stock]


def _unfit_fields(config: Kosmos2Config) -> list[str]:
    text, vision = config.text_config, config.vision_config
    wanted: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("text_config.activation_function", text.activation_function, ("gelu",)),
        ("text_config.add_cross_attention", text.add_cross_attention, (False,)),
        ("text_config.pad_token_id", text.pad_token_id, (PAD_ID,)),
        ("text_config.tie_word_embeddings", text.tie_word_embeddings, (config.tie_word_embeddings,)),
        ("vision_config.hidden_act", vision.hidden_act, ("quick_gelu", "gelu")),
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, (VISION_EPSILON,)),
        ("vision_config.num_channels", vision.num_channels, (3,)),
    )
    unfit = [
        f"{field}={value!r} must be {' or '.join(map(repr, legal))}"
        for field, value, legal in wanted
        if value not in legal
    ]
    squares = {name: getattr(vision, name) for name in ("image_size", "patch_size")}
    return unfit + [
        f"vision_config.{name}={value!r} must be one number"
        for name, value in squares.items()
        if not isinstance(value, int)
    ]


def _refuse(what: str, reasons: list[str]) -> None:
    if reasons:
        raise FormatError(f"{what}:\n  " + "\n  ".join(reasons))
