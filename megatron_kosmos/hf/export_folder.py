"""Everything of an exported folder but its weights and its card: configurations, tokenizer files and code."""

from pathlib import Path

import torch
from transformers import GenerationConfig, Kosmos2Config, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from megatron_kosmos.config import CrossAttentionConfig, ModelConfig, ResamplerConfig
from megatron_kosmos.hf import (
    KosmosConfig,
    KosmosForConditionalGeneration,
    KosmosImageProcessor,
    KosmosProcessor,
)
from megatron_kosmos.hf.kosmos2 import kosmos2_generation_config, kosmos2_processor
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

MAX_NEW_TOKENS = 64
"""What `generate()` writes at most when it is not told: captions are short."""


def kosmos_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> KosmosConfig:
    """Translate a training configuration; without a tokenizer, special tokens have the class's default ids."""
    decoder, vision, resampler = model.decoder, model.vision, model.resampler
    roles = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "end_of_image_token_id")
    ids = {} if tokenizer is None else {role: getattr(tokenizer, role) for role in roles}
    return KosmosConfig(
        architectures=[KosmosForConditionalGeneration.__name__],
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.width,
        intermediate_size=decoder.ffn_width,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_query_groups or decoder.num_heads,
        max_position_embeddings=decoder.max_sequence_length,
        xpos=decoder.xpos,
        positions=decoder.positions,
        scale_embeddings=decoder.scale_embeddings,
        query_key_norm=decoder.query_key_norm,
        dropout=decoder.dropout,
        attention_dropout=decoder.attention_dropout,
        layer_norm_eps=decoder.layer_norm_epsilon,
        tie_word_embeddings=decoder.tie_embeddings,
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.ffn_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
        },
        vision_features=vision.features,
        resampler=resampler.kind,
        resampler_num_heads=resampler.num_heads,
        num_image_tokens=resampler.num_latents,
        **_resampler_sizes(resampler),
        **ids,
    )


def _resampler_sizes(resampler: ResamplerConfig) -> dict[str, int | float]:
    """Return what only one kind of resampler has."""
    if isinstance(resampler, CrossAttentionConfig):
        return {"resampler_attention_dropout": resampler.attention_dropout}
    return {
        "resampler_depth": resampler.depth,
        "resampler_head_size": resampler.head_size,
        "resampler_ffn_multiplier": resampler.ffn_multiplier,
    }


def kosmos_processor(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> KosmosProcessor:
    """Return the processor that lays out prompts and pictures as training did."""
    side = model.vision.image_size
    image_processor = KosmosImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    tokenizer.model_max_length = model.decoder.max_sequence_length
    return KosmosProcessor(image_processor, tokenizer, model.resampler.num_latents)


def generation_config(config: KosmosConfig) -> GenerationConfig:
    """Return defaults for `generate()`: it writes text, so padding, `<s>` and image markers are never chosen."""
    markers = [config.pad_token_id, config.bos_token_id, config.image_token_id, config.end_of_image_token_id]
    return GenerationConfig(
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        suppress_tokens=[marker for marker in markers if marker != config.eos_token_id],  # `<s>` may be `</s>`
        max_new_tokens=MAX_NEW_TOKENS,
    )


def write_folder(folder: Path, config: KosmosConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write configurations, tokenizer files and the code that `trust_remote_code` runs to `folder`."""
    with torch.device("meta"):
        exported = KosmosForConditionalGeneration(config)
    custom_object_save(exported, folder, config=config)
    # A class registers for one Auto class; transformers' pipeline looks under another.
    config.auto_map["AutoModelForImageTextToText"] = config.auto_map["AutoModelForCausalLM"]
    config.save_pretrained(folder)
    generation_config(config).save_pretrained(folder)
    kosmos_processor(model, tokenizer).save_pretrained(folder)


def write_kosmos2_folder(
    folder: Path, config: Kosmos2Config, model: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write configurations and tokenizer files for transformers' own classes. Raises FormatError."""
    processor = kosmos2_processor(model, tokenizer)
    config.save_pretrained(folder)
    kosmos2_generation_config(config, MAX_NEW_TOKENS).save_pretrained(folder)
    processor.save_pretrained(folder)
