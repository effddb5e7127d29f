"""The table of what is trained, and what is said of changes across a resume."""

from typing import Any

import pytest

from megatron_kosmos.config import ConfigError
from megatron_kosmos.engine.dry_run import plan
from megatron_kosmos.engine.trainable import Row, describe_changes, rows, trainable_text
from tests.distributed.tiny import tiny_run

GROUPS: list[dict[str, Any]] = [
    {"parameters": ["decoder.layers.0.*"], "learning_rate_scale": 0.5, "weight_decay": 0.3},
    {"parameters": ["vision_tower.*", "resampler.latents"], "frozen": True},
]
TP2_PP2 = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2}


def test_rows_count_each_weight_once_whatever_the_layout() -> None:
    changes = {"optimizer__groups": GROUPS, "model__decoder__tie_embeddings": True}
    run = tiny_run(**changes)
    counted = rows(run, plan(run, 1).weights)
    assert rows(run, plan(tiny_run(**changes, **TP2_PP2), 4).weights) == counted
    assert [(row.part, row.group) for row in counted] == [
        ("embedding", None),
        ("vision", 1),
        ("resampler", 1),
        ("resampler", None),
        ("decoder", 0),
        ("decoder", None),
    ]
    decoder = run.model.decoder
    assert counted[0] == Row("embedding", None, 1, decoder.padded_vocab_size * decoder.width)
    assert counted[2] == Row("resampler", 1, 0, 0, 1, 3 * run.model.vision.width)
    assert (counted[1].trained_tensors, counted[4].frozen_tensors) == (0, 0)


def test_the_table_shows_rates_and_decays_of_what_is_trained() -> None:
    run = tiny_run(optimizer__groups=GROUPS)
    text = trainable_text(run, plan(run, 1).weights)
    lines = {tuple(line.split()[:2]): line.split() for line in text.splitlines() if line.split()}
    assert lines["decoder", "0"][-2:] == ["0.005", "0.3"]
    assert lines["output", "3,072"][-2:] == ["0.01", "0.1"]
    assert lines["vision", "1"][2] == "0"
    assert max(map(len, text.splitlines())) <= 80


def test_a_tied_output_layer_goes_by_the_embedding_s_name() -> None:
    groups = [{"parameters": ["output_layer.*"], "frozen": True}]
    plan(tiny_run(optimizer__groups=groups), 1)
    with pytest.raises(ConfigError, match=r"the output layer is embedding\.word_embeddings\.weight"):
        plan(tiny_run(optimizer__groups=groups, model__decoder__tie_embeddings=True), 1)


def test_changes_are_named_and_counted() -> None:
    run = tiny_run(optimizer__groups=[{"parameters": ["decoder.*"], "frozen": True}])
    weights = plan(run, 1).weights
    before = {weight.name for weight in weights if weight.name != "output_layer.weight"}
    trained, frozen = describe_changes(weights, before - {"vision_tower.post_layernorm.weight"})
    assert trained == "newly trained, with moments of zero: 1 tensors of 3,072 elements, output_layer.weight"
    assert frozen.startswith("newly frozen, as saved: ")
    assert "decoder.layers.0." in frozen
    assert frozen.endswith(" more")
    assert describe_changes(weights, {weight.name for weight in weights if weight.is_trained}) == []
