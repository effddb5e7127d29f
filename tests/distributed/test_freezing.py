"""Freezing: exactly the intended weights move, under every layout, and what moves gets one process's gradients."""

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from megatron_kosmos.config import ConfigError, RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.dry_run import plan
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import LAYOUTS, assert_same, train
from tests.distributed.tiny import rank_batches, tiny_run
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
        {"parameters": ["decoder.layers.3.*"], "learning_rate_scale": 0.1, "weight_decay": 0.2},
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


COVERED = {
    "tp2_sp": ("only_resampler", "only_biases", "only_norms", "first_layers"),
    "pp2": ("kosmos1", "decoder", "only_last_layer", "only_output", "rates"),
    "pp2_vpp2": ("below_decoder", "only_resampler"),
    "pp2_dp2_zero0": ("only_output",),
    "tp2_pp2": ("rates",),
    "dp2_zero1": ("decoder", "rates"),
    "dp2_zero2": ("only_last_layer",),
    "dp2_zero3": ("below_decoder", "rates"),
    "tp2_sp_dp2_zero3": ("only_biases",),
}
"""Every freezing somewhere, and in every layout those that it might not bear."""


@pytest.mark.parametrize("layout, freezing", [(layout, one) for layout, all_ in COVERED.items() for one in all_])
def test_every_layout_trains_what_one_process_trains(layout: str, freezing: str) -> None:
    record = train(layout, num_steps=NUM_STEPS, **changes_of(freezing))
    assert_same(record, one_process(freezing))
    if LAYOUTS[layout][1].get("zero_stage") != 3:  # what ZeRO 3 has cut and not trained is not gathered
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


@pytest.mark.parametrize("layout, freezing", [("tp2_sp", "only_norms"), ("pp2", "only_resampler")])
def test_bf16_trains_where_a_rank_has_nothing_that_counts_in_the_norm(layout: str, freezing: str) -> None:
    """With bf16 ZeRO 1 is another optimizer of DeepSpeed's, which fails on a norm of nothing."""
    record = train(layout, num_steps=NUM_STEPS, training__precision="bf16", **changes_of(freezing))
    for ours, fp32 in zip(record.grad_norms, one_process(freezing).grad_norms, strict=True):
        assert ours == pytest.approx(fp32, rel=3e-2)


@pytest.mark.parametrize(
    "layout, freezing, pattern",
    [
        ("pp2_dp2", "kosmos1", "titi tttt"),
        ("pp2_vpp2", "only_resampler", "tttt iiii"),
        ("tp2_sp", "decoder", "itti tttt"),
        ("dp2_zero2", "only_resampler", "titi tttt"),
        ("dp2_zero3", "kosmos1", "titi iiii"),
    ],
)
def test_images_may_come_in_any_order_whatever_is_frozen(layout: str, freezing: str, pattern: str) -> None:
    record = train(layout, pattern, num_steps=NUM_STEPS, **changes_of(freezing))
    assert_same(record, one_process(freezing, pattern))


def outputs_with_graph(run: RunConfig) -> dict[str, bool]:
    """Train a step; return of this rank's images, words and decoder layers whether their output was part of a graph."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    seen: dict[str, bool] = {}

    def watch(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).requires_grad

        module.register_forward_hook(note)

    for chunk in stage.chunks:
        for number, layer in enumerate(chunk.decoder.layers):
            watch(f"layer {chunk.chunk.first_layer + number}", layer)
        if chunk.chunk.is_first:
            for number, layer in enumerate(chunk.vision_tower.encoder.layers):
                watch(f"vision {number}", layer)
            watch("resampler", chunk.resampler)
            watch("words", chunk.embedding)
    StepRunner(run, stage, topology).train(0, rank_batches(0, "timm", topology))
    return seen


@pytest.mark.parametrize(
    "layout, freezing, lowest",
    [
        ("dp2_zero3", "kosmos1", "vision 2"),
        ("pp2", "only_resampler", "resampler"),
        ("dp2_zero2", "first_layers", "layer 2"),
        ("pp2", "only_last_layer", "layer 3"),
        ("pp2_vpp2", "first_layers", "layer 2"),
    ],
)
def test_nothing_is_kept_for_a_backward_pass_below_the_lowest_trained_weight(
    layout: str, freezing: str, lowest: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    run = tiny_run(**changes_of(freezing), **{f"parallel__{key}": value for key, value in parallel.items()})
    ranks = run_ranks(outputs_with_graph, world_size, run)
    order = [*(f"vision {n}" for n in range(3)), "resampler", "words", *(f"layer {n}" for n in range(4))]
    has_graph = {name: graph for rank in ranks for name, graph in rank.items()}
    expected = {name: order.index(name) >= order.index(lowest) for name in order}
    if freezing == "kosmos1":
        expected["words"] = True
    assert has_graph == expected


def refusal(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        build_stage(run, build_topology(run.parallel, torch.device("cpu")))
    return str(error.value)


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            [frozen("decoder.layers.1.*", "decoder.layer.3.*", "output_layer.weigth")],
            r"optimizer\.groups\.0\.parameters: 'decoder\.layer\.3\.\*' matches no parameter of the model; "
            r"the closest are decoder\.\S+.*\n"
            r"optimizer\.groups\.0\.parameters: 'output_layer\.weigth' .* output_layer\.weight",
        ),
        ([trained("vision_tower.post_layernorm.*"), frozen("*")], "freezes every parameter"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused_alike_everywhere(
    groups: list[dict[str, Any]], message: str
) -> None:
    """Patterns may match on another stage only; post_layernorm is never trained where features are `hidden`."""
    run = tiny_run(parallel__pipeline_parallel_size=2, optimizer__groups=groups)
    said = run_ranks(refusal, 2, run)
    assert said[0] == said[1]
    assert re.search(message, said[0])
    with pytest.raises(ConfigError, match=message):
        plan(run, 2)


def test_each_group_steps_with_its_own_rate_and_decay() -> None:
    """AdamW's first step by hand: w - rate · (decay · w + g / (|g| + ε)), g clipped."""
    record = train_in_ranks(2, "timm", 1, **changes_of("rates"))
    run = tiny_run(**changes_of("rates"))
    clip = min(1.0, run.optimizer.clip_grad_norm / record.grad_norms[0])
    for name, scale, decay in (
        ("decoder.layers.3.mlp.linear_fc1.weight", 0.1, 0.2),
        ("decoder.layers.3.mlp.linear_fc1.bias", 0.1, 0.0),
        ("decoder.layers.2.mlp.linear_fc1.weight", 1.0, 0.1),
        ("output_layer.weight", 3.0, 0.5),
        ("vision_tower.encoder.layers.1.mlp.fc2.weight", 0.5, 0.1),
    ):
        start, gradient = initial_weights(tied=False)[name], clip * record.gradients[name]
        rate = scale * run.optimizer.learning_rate / run.optimizer.warmup_steps
        expected = start - rate * (decay * start + gradient / (gradient.abs() + run.optimizer.epsilon))
        torch.testing.assert_close(record.weights[name], expected, rtol=1e-5, atol=1e-6)
