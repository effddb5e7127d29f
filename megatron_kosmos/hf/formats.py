"""The kinds of Hugging Face model that a KOSMOS can be: ours, which holds any, and transformers' Kosmos-2."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, PreTrainedModel

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.folder_weights import FolderError
from megatron_kosmos.hf.kosmos2 import as_kosmos_config, kosmos2_name
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration
from megatron_kosmos.hf.name_map import Entry, name_table

HFConfig: TypeAlias = KosmosConfig | Kosmos2Config
Format = Literal["kosmos", "kosmos2"]

CONFIG_FILE = "config.json"


def build_model(config: HFConfig) -> PreTrainedModel:
    """Return the model of a configuration, with fresh weights."""
    if isinstance(config, Kosmos2Config):
        return Kosmos2ForConditionalGeneration(config)
    return KosmosForConditionalGeneration(config)


def table_of(config: HFConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    """Return the correspondence of training names and those of the model of `config`."""
    if not isinstance(config, Kosmos2Config):
        return name_table(config, padded_vocab_size)
    return tuple(
        replace(entry, hf_names=tuple(map(kosmos2_name, entry.hf_names)))
        for entry in name_table(as_kosmos_config(config), padded_vocab_size)
    )


def read_config(folder: Path) -> HFConfig:
    """Return the configuration of a folder. Raises FolderError where it is none of a KOSMOS."""
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder")
    path = folder / CONFIG_FILE
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise FolderError(f"{folder} is no model of transformers: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is not a configuration of transformers: {error!r}") from error
    known: dict[str, type[KosmosConfig] | type[Kosmos2Config]] = {
        one.model_type: one for one in (KosmosConfig, Kosmos2Config)
    }
    if kind not in known:
        raise FolderError(f"{path} says model_type={kind!r}; {' and '.join(known)} can be converted")
    try:
        config: HFConfig = known[kind].from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise FolderError(f"{path} is not a configuration of transformers: {type(error).__name__}: {error}") from error
    return config


def model_settings(config: HFConfig) -> Mapping[str, Any]:
    """Return the section `model` of a run's configuration that builds the same network.

    Raises FormatError for a Kosmos-2 that cannot be trained here.
    """
    if isinstance(config, Kosmos2Config):
        config = as_kosmos_config(config)
    vision = config.vision_config
    resampler: dict[str, Any] = {
        "kind": config.resampler,
        "num_latents": config.num_image_tokens,
        "num_heads": config.resampler_num_heads,
    }
    if config.resampler == "perceiver":
        resampler |= {
            "depth": config.resampler_depth,
            "head_size": config.resampler_head_size,
            "ffn_multiplier": config.resampler_ffn_multiplier,
        }
    else:
        resampler["attention_dropout"] = config.resampler_attention_dropout
    groups = config.num_key_value_heads
    return {
        "decoder": {
            "num_layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "ffn_width": config.intermediate_size,
            "num_heads": config.num_attention_heads,
            "num_query_groups": None if groups == config.num_attention_heads else groups,
            "vocab_size": config.vocab_size,
            "max_sequence_length": config.max_position_embeddings,
            "xpos": config.xpos,
            "positions": config.positions,
            "scale_embeddings": config.scale_embeddings,
            "query_key_norm": config.query_key_norm,
            "tie_embeddings": config.tie_word_embeddings,
            "dropout": float(config.dropout),
            "attention_dropout": float(config.attention_dropout),
            "layer_norm_epsilon": config.layer_norm_eps,
        },
        "vision": {
            "width": vision.hidden_size,
            "ffn_width": vision.intermediate_size,
            "num_layers": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "activation": vision.hidden_act,
            "features": config.vision_features,
        },
        "resampler": resampler,
    }
