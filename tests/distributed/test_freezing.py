"""Freezing: exactly the intended weights move, under every layout, and what moves gets one process's gradients."""

from functools import cache
from typing import Any

import pytest
import torch

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import LAYOUTS, assert_same, train
from tests.distributed.tiny import tiny_run
from tests.distributed.training import TrainingRecord, train_in_ranks, whole_weights

pytestmark = pytest.mark.distributed

NUM_STEPS = 2


def frozen(*patterns: str) -> dict[str, Any]:
    return {"parameters": list(patterns), "frozen": True}


def trained(*patterns: str) -> dict[str, Any]:
    return {"parameters": list(patterns)}


FREEZINGS: dict[str, list[dict[str, Any]]] = {
    "kosmos1": [trained("vision_tower.encoder.layers.2.*"), frozen("vision_tower.*")],
    "decoder": [frozen("decoder.*", "output_layer.*", "embedding.*")],
    "only_resampler": [trained("resampler.*"), frozen("*")],
    "below_decoder": [frozen("vision_tower.*", "resampler.*", "embedding.*")],
    "only_biases": [trained("*.bias"), frozen("*")],
    "only_norms": [trained("*norm.weight", "*norm.bias"), frozen("*")],
    "only_last_layer": [trained("decoder.layers.3.*"), frozen("*")],
    "only_output": [trained("output_layer.*"), frozen("*")],
    "first_layers": [frozen("vision_tower.*", "resampler.*", "embedding.*", "decoder.layers.[01].*")],
    "in_between": [frozen("decoder.layers.[12].*")],
    "rates": [
        {"parameters": ["decoder.layers.3.*"], "learning_rate_scale": 0.1, "weight_decay": 0.0},
        {"parameters": ["output_layer.weight"], "learning_rate_scale": 3.0, "weight_decay": 0.5},
        {"parameters": ["vision_tower.*"], "learning_rate_scale": 0.5},
    ],
}
"""Groups by what they do; the first that matches a name counts."""

TIED_FREEZINGS = {
    "tied_embedding": [frozen("embedding.*")],
    "tied_all_but_embedding": [trained("embedding.*"), frozen("*")],
}


@cache
def one_process(freezing: str, pattern: str = "timm") -> TrainingRecord:
    return train_in_ranks(1, pattern, NUM_STEPS, parallel__zero_stage=0, **changes_of(freezing))


def changes_of(freezing: str) -> dict[str, Any]:
    groups = (FREEZINGS | TIED_FREEZINGS)[freezing]
    return {"optimizer__groups": groups, "model__decoder__tie_embeddings": freezing in TIED_FREEZINGS}


@cache
def initial_weights(tied: bool) -> dict[str, torch.Tensor]:
    return run_ranks(weights_at_start, 1, tiny_run(model__decoder__tie_embeddings=tied))[0]


def weights_at_start(run: RunConfig) -> dict[str, torch.Tensor]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    return whole_weights(build_stage(run, topology)[0], topology)


def assert_only_the_trained_move(record: TrainingRecord, freezing: str) -> None:
    run = tiny_run(**changes_of(freezing))
    start = initial_weights(run.model.decoder.tie_embeddings)
    unreached = {name for name in start if "post_layernorm" in name}
    intended = {name for name in start if not run.optimizer.freezes(name)} - unreached
    assert intended
    assert record.weights.keys() == start.keys()
    moved = {name for name, weight in record.weights.items() if not torch.equal(weight, start[name])}
    assert moved == intended


@pytest.mark.parametrize("freezing", [*FREEZINGS, *TIED_FREEZINGS])
def test_exactly_the_intended_weights_move(freezing: str) -> None:
    record = one_process(freezing)
    assert_only_the_trained_move(record, freezing)
    assert record.gradients.keys() == {
        name
        for name, start in initial_weights(freezing in TIED_FREEZINGS).items()
        if not torch.equal(record.weights[name], start)
    }


def gathers_frozen(layout: str) -> bool:
    """Whether the record has weights that are not trained: what ZeRO 3 has cut and not trained is not gathered."""
    return LAYOUTS[layout][1].get("zero_stage") != 3


COVERED = {
    "tp2_sp": ("kosmos1", "decoder", "only_resampler", "only_biases", "only_norms", "first_layers"),
    "pp2": ("kosmos1", "decoder", "only_resampler", "below_decoder", "only_last_layer", "only_output", "rates"),
    "pp2_vpp2": ("kosmos1", "only_resampler", "only_last_layer", "in_between", "only_biases"),
    "pp2_dp2_zero0": ("only_resampler", "only_output"),
    "tp2_pp2": ("only_norms", "only_last_layer", "rates"),
    "dp2_zero1": ("decoder", "only_biases", "rates"),
    "dp2_zero2": ("kosmos1", "only_resampler", "only_last_layer", "rates"),
    "dp2_zero3": ("kosmos1", "decoder", "below_decoder", "only_norms", "rates"),
    "tp2_sp_dp2_zero3": ("only_resampler", "first_layers"),
}


@pytest.mark.parametrize("layout, freezing", [(layout, one) for layout, all_ in COVERED.items() for one in all_])
def test_every_layout_trains_what_one_process_trains(layout: str, freezing: str) -> None:
    record = train(layout, num_steps=NUM_STEPS, **changes_of(freezing))
    assert_same(record, one_process(freezing))
    if gathers_frozen(layout):
        assert_only_the_trained_move(record, freezing)


@pytest.mark.parametrize(
    "layout, freezing",
    [("tp2_sp", "only_norms"), ("pp2_vpp2", "in_between"), ("dp2_zero3", "first_layers"), ("pp2", "only_last_layer")],
)
def test_recomputation_reaches_what_is_trained_above_frozen_weights(layout: str, freezing: str) -> None:
    record = train(layout, num_steps=NUM_STEPS, training__recompute="full", **changes_of(freezing))
    assert_same(record, one_process(freezing))


@pytest.mark.parametrize("freezing", TIED_FREEZINGS)
@pytest.mark.parametrize("layout", ["pp2", "dp2_zero2"])
def test_a_tied_embedding_is_frozen_in_both_places(layout: str, freezing: str) -> None:
    record = train(layout, num_steps=NUM_STEPS, **changes_of(freezing))
    assert_same(record, one_process(freezing))
    assert_only_the_trained_move(record, freezing)
