"""What an export says of its model where logits of the small test models would not show it."""

from pathlib import Path

from megatron_kosmos.hf.export_folder import kosmos_config
from megatron_kosmos.hf.load_tokenizer import training_tokenizer
from tests.distributed.tiny import tiny_run


def test_values_that_differ_from_the_defaults_are_exported(tokenizers: dict[str, Path]) -> None:
    model = tiny_run(
        model__decoder__layer_norm_epsilon=1e-6,
        model__decoder__dropout=0.2,
        model__decoder__attention_dropout=0.3,
        model__resampler={"kind": "cross_attention", "num_latents": 3, "num_heads": 4, "attention_dropout": 0.4},
    ).model
    config = kosmos_config(model, training_tokenizer(tokenizers["trained"]))
    assert config.layer_norm_eps == 1e-6
    assert (config.dropout, config.attention_dropout, config.resampler_attention_dropout) == (0.2, 0.3, 0.4)
