"""Which parameters of the real model are decayed, which are not, and that none is lost."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_kosmos.config import OptimizerConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, build_stage, derive_transformer_config
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.optim.groups import add_placeholders, group_parameters, is_decayed, torch_groups
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import frozen_vision, tiny_run

DECAY = 0.1

DECAYED = (
    r"embedding\.word_embeddings\.weight",
    r"output_layer\.weight",
    r"decoder\.layers\.\d\.self_attention\.(linear_qkv|linear_proj)\.weight",
    r"decoder\.layers\.\d\.mlp\.(linear_fc1|linear_fc2)\.weight",
    r"vision_tower\.embeddings\.patch_embedding\.weight",
    r"vision_tower\.encoder\.layers\.\d\.self_attn\.(q|k|v|out)_proj\.weight",
    r"vision_tower\.encoder\.layers\.\d\.mlp\.fc\d\.weight",
    r"resampler\.layers\.\d\.attention\.(to_q|to_kv|to_out)\.weight",
    r"resampler\.layers\.\d\.ffn\.fc\d\.weight",
    r"resampler\.projection\.weight",
)
UNDECAYED = (
    r"embedding\.position_embeddings\.weight",
    r"vision_tower\.embeddings\.(class_embedding|position_embedding\.weight)",
    r"resampler\.(latents|frame_embedding)",
    r".*\.bias",
    r".*(norm|layrnorm|layer_norm\d)\.weight",
)


def groups_of_model(run: RunConfig) -> tuple[dict[str, bool], dict[float, list[str]]]:
    """Return which parameters are trained, and the groups, by name."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    named = [(one.name, one.parameter) for one in named_parameters(chunk)]
    names = {parameter: name for name, parameter in named}
    groups = torch_groups(group_parameters(named, run.optimizer))
    assert len({group["weight_decay"] for group in groups}) == len(groups)
    return (
        {name: parameter.requires_grad for name, parameter in named},
        {group["weight_decay"]: [names[parameter] for parameter in group["params"]] for group in groups},
    )


@pytest.mark.distributed
@pytest.mark.parametrize("frozen_layers", [0, 2, 3])
def test_every_trained_parameter_of_the_model_is_in_the_group_that_fits(frozen_layers: int) -> None:
    run = tiny_run(model__decoder__positions="learned", optimizer__groups=frozen_vision(frozen_layers))
    is_trained, groups = run_ranks(groups_of_model, 1, run)[0]
    assert sorted(groups) == [0.0, DECAY]
    assert sorted(groups[0.0] + groups[DECAY]) == sorted(name for name, trained in is_trained.items() if trained)
    for decay, patterns in ((DECAY, DECAYED), (0.0, UNDECAYED)):
        for name in groups[decay]:
            assert any(re.fullmatch(pattern, name) for pattern in patterns), (name, decay)
    if frozen_layers == 0:
        seen = groups[0.0] + groups[DECAY]
        unused = [pattern for pattern in DECAYED + UNDECAYED if not any(re.fullmatch(pattern, name) for name in seen)]
        assert unused == []


def settings(*groups: dict[str, Any], **changes: Any) -> OptimizerConfig:
    values: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": DECAY, "groups": list(groups)}
    return OptimizerConfig.model_validate_json(json.dumps(values | changes))


def weights(*shapes: tuple[int, ...]) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(torch.zeros(shape)) for shape in shapes)


def test_groups_keep_the_order_and_leave_out_what_is_frozen() -> None:
    matrix, bias, other, frozen = weights((2, 2), (2,), (2, 2), (2, 2))
    frozen.requires_grad_(False)
    named = [("b.bias", bias), ("a.weight", matrix), ("c.weight", frozen), ("d.weight", other)]
    groups = torch_groups(group_parameters(named, settings()))
    assert [group["params"] for group in groups] == [[bias], [matrix, other]]
    assert [group["weight_decay"] for group in groups] == [0.0, DECAY]
    assert group_parameters([("c.weight", frozen)], settings()) == {}


def test_without_decay_there_is_one_group() -> None:
    matrix, bias = weights((2, 2), (2,))
    (group,) = torch_groups(group_parameters([("a.weight", matrix), ("a.bias", bias)], settings(weight_decay=0.0)))
    assert group["params"] == [matrix, bias]


def test_a_group_has_its_own_rate_and_its_own_decay_of_matrices_only() -> None:
    matrix, bias, other = weights((2, 2), (2,), (2, 2))
    named = [("a.weight", matrix), ("a.bias", bias), ("b.weight", other)]
    own = {"parameters": ["a.*"], "learning_rate_scale": 0.1, "weight_decay": 0.5}
    later = {"parameters": ["*"], "learning_rate_scale": 7.0}
    groups = torch_groups(group_parameters(named, settings(own, later)))
    assert [(group["params"], group["learning_rate_scale"], group["weight_decay"]) for group in groups] == [
        ([matrix], 0.1, 0.5),
        ([bias], 0.1, 0.0),
        ([other], 7.0, DECAY),
    ]


def test_a_rank_without_weights_of_a_group_holds_a_zero_there() -> None:
    counted, uncounted = weights((2, 2), (3, 3))
    groups = group_parameters([("a.weight", counted), ("b.weight", uncounted)], settings({"parameters": ["b.*"]}))
    assert len(groups) == 1, "equal settings are one group, whatever pattern gave them"
    faster = settings({"parameters": ["b.*"], "learning_rate_scale": 2.0})
    groups = group_parameters([("a.weight", counted), ("b.weight", uncounted)], faster)
    empty = replace(next(iter(groups)), learning_rate_scale=3.0)
    groups[empty] = []
    placeholders = add_placeholders(groups, [counted], counted)
    assert [len(parameters) for parameters in groups.values()] == [1, 2, 1]
    assert [placeholder.tolist() for placeholder in placeholders] == [[0.0], [0.0]]
    assert groups[empty] == placeholders[1:]


def pipeline_groups(run: RunConfig) -> list[tuple[float, float, int]]:
    stage, _ = build_stage(run, build_topology(run.parallel, torch.device("cpu")))
    groups = stage.optimizer.adamw.param_groups
    return [(group["learning_rate_scale"], group["weight_decay"], len(group["params"])) for group in groups]


@pytest.mark.distributed
def test_pipeline_stages_have_the_same_groups_in_the_same_order() -> None:
    """DeepSpeed's ZeRO reduces norms group by group; a stage without weights of a group has it all the same."""
    faster = {"parameters": ["output_layer.weight"], "learning_rate_scale": 2.0}
    slower = {"parameters": ["vision_tower.*"], "learning_rate_scale": 0.5, "weight_decay": 0.0}
    run = tiny_run(parallel__pipeline_parallel_size=2, optimizer__groups=[faster, slower])
    first, last = run_ranks(pipeline_groups, 2, run)
    assert first == last
    assert sorted(first) == [(0.5, 0.0, 1), (1.0, 0.0, 1), (1.0, DECAY, 1), (2.0, DECAY, 1)]


@pytest.mark.parametrize("name", ["embedding.position_embeddings.weight", "resampler.latents"])
def test_a_name_decides_where_the_shape_does_not(name: str) -> None:
    matrix = nn.Parameter(torch.zeros(3, 3))
    assert not is_decayed(name, matrix)
    assert is_decayed("decoder.layers.0.mlp.linear_fc1.weight", matrix)
