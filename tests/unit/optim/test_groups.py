"""Which parameters of the real model are decayed, which are not, and that none is lost."""

import re

import pytest
import torch
from torch import nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.optim.groups import is_decayed, parameter_groups
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
    groups = parameter_groups(named, DECAY)
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


def test_groups_keep_the_order_and_empty_ones_are_left_out() -> None:
    matrix, bias, frozen = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), (2, 2)))
    frozen.requires_grad_(False)
    named = [("b.bias", bias), ("a.weight", matrix), ("c.weight", frozen)]
    assert [group["params"] for group in parameter_groups(named, DECAY)] == [[matrix], [bias]]
    assert parameter_groups([("a.weight", matrix)], DECAY) == [{"params": [matrix], "weight_decay": DECAY}]
    assert parameter_groups([("c.weight", frozen)], DECAY) == []


def test_without_decay_there_is_one_group() -> None:
    matrix, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    groups = parameter_groups([("a.weight", matrix), ("a.bias", bias)], 0.0)
    assert groups == [{"params": [matrix, bias], "weight_decay": 0.0}]


@pytest.mark.parametrize("name", ["embedding.position_embeddings.weight", "resampler.latents"])
def test_a_name_decides_where_the_shape_does_not(name: str) -> None:
    matrix = nn.Parameter(torch.zeros(3, 3))
    assert not is_decayed(name, matrix)
    assert is_decayed("decoder.layers.0.mlp.linear_fc1.weight", matrix)
