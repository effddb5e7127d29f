"""Settings of a model go to other formats and come back: none is lost, and none that differs passes for the same."""

from typing import Any

import pytest

from megatron_kosmos.config import DecoderConfig, ModelConfig
from megatron_kosmos.hf.export_folder import kosmos_config
from megatron_kosmos.hf.formats import HFConfig, model_settings
from megatron_kosmos.hf.kosmos2 import kosmos2_config
from megatron_kosmos.hf.torchscale_names import DEFAULTS, FIELDS, FIXED, differences
from tests.distributed.tiny import tiny_run

NOT_EXPORTED = {"vocab_multiple", "embedding_std", "pretrained", "position_embedding_std", "query_key_gain"}
"""How training begins and pads, which an exported model does not have."""
DECODER = {"dropout": 0.2, "attention_dropout": 0.3, "layer_norm_epsilon": 1e-6, "scale_embeddings": True}
VISION = {"activation": "gelu", "features": "normalized"}
PERCEIVER = {"kind": "perceiver", "num_latents": 5, "num_heads": 3, "head_size": 7, "depth": 3, "ffn_multiplier": 2}
CROSS_ATTENTION = {"kind": "cross_attention", "num_latents": 5, "num_heads": 4, "attention_dropout": 0.3}


class Tokenizer:
    """The ids that a configuration takes from a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id, image_token_id, end_of_image_token_id = 1, 0, 2, 9, 10


def odd_model(resampler: dict[str, Any], **decoder: Any) -> ModelConfig:
    """Return a model that has the default of hardly a setting."""
    changes = {f"model__decoder__{name}": value for name, value in (DECODER | decoder).items()}
    changes |= {f"model__vision__{name}": value for name, value in VISION.items()}
    return tiny_run(model__resampler=resampler, **changes).model


def exported_settings(model: ModelConfig) -> dict[str, dict[str, Any]]:
    parts = model.model_dump(mode="json")
    return {
        part: {name: value for name, value in fields.items() if name not in NOT_EXPORTED}
        for part, fields in parts.items()
    }


def configs() -> dict[str, tuple[ModelConfig, HFConfig]]:
    sinusoidal = odd_model(CROSS_ATTENTION, xpos=False, positions="sinusoidal", tie_embeddings=True)
    learned = odd_model(PERCEIVER, positions="learned", query_key_norm=True, num_query_groups=2)
    tokenizer: Any = Tokenizer()
    return {
        "kosmos": (learned, kosmos_config(learned, tokenizer)),
        "kosmos, tied": (sinusoidal, kosmos_config(sinusoidal, tokenizer)),
        "kosmos2": (sinusoidal, kosmos2_config(sinusoidal, tokenizer)),
    }


@pytest.mark.parametrize("kind", ["kosmos", "kosmos, tied", "kosmos2"])
def test_every_setting_of_the_network_comes_back(kind: str) -> None:
    model, config = configs()[kind]
    assert model_settings(config) == exported_settings(model)
    assert (config.get_text_config().pad_token_id, config.get_text_config().eos_token_id) == (1, 2)


def torchscale_settings(decoder: DecoderConfig) -> dict[str, Any]:
    values = {theirs: getattr(decoder, ours) for theirs, ours in FIELDS.items()}
    return values | {"no_scale_embedding": not decoder.scale_embeddings}


def another(value: Any) -> Any:
    return not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else value * 2 + 1


@pytest.mark.parametrize("field", [*DEFAULTS, "vocab_size", *FIXED])
def test_every_setting_of_torchscale_that_differs_is_told(field: str) -> None:
    decoder = tiny_run(model__decoder__layer_norm_epsilon=1e-5).model.decoder
    settings = torchscale_settings(decoder) | dict(FIXED)
    assert differences(settings, decoder) == []
    (problem,) = differences(settings | {field: another(settings[field])}, decoder)
    assert problem.startswith(f"{field}={another(settings[field])!r}: ")


def test_the_settings_of_torchscale_that_matter_are_known() -> None:
    """Removing one from the tables would let another network pass."""
    assert (
        {*DEFAULTS, "vocab_size"}
        == FIELDS.keys()
        == {
            *("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_ffn_embed_dim", "decoder_attention_heads"),
            *("layernorm_eps", "share_decoder_input_output_embed", "xpos_rel_pos", "no_scale_embedding"),
        }
    )
    assert FIXED.keys() == {
        *("activation_fn", "decoder_normalize_before", "subln", "deepnorm", "multiway", "layernorm_embedding"),
        *("moe_freq", "rel_pos_buckets", "no_output_layer", "xpos_scale_base"),
    }
