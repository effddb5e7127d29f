"""Initial weights: every family's distribution against its formula, and one seed for every layout."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kosmos.config import ModelConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import initial_tensor, initialize
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LATENTS, VOCAB, tiny_run
from tests.distributed.training import gather

SEED = 3
D, F, LAYERS, HEADS, E = 128, 512, 4, 8, 64
WIDE = {
    "model__decoder__width": D,
    "model__decoder__ffn_width": F,
    "model__decoder__num_layers": LAYERS,
    "model__decoder__num_heads": HEADS,
    "model__vision__width": E,
    "model__vision__ffn_width": 256,
}
"""A model wide enough for its statistics to tell formulas apart."""
KOSMOS_2 = {
    "model__decoder__positions": "sinusoidal",
    "model__decoder__scale_embeddings": True,
    "model__decoder__query_key_norm": True,
    "model__decoder__num_query_groups": 1,
    "model__vision__features": "normalized",
    "model__resampler": {"kind": "cross_attention", "num_latents": LATENTS, "num_heads": 4},
}
"""KOSMOS-2's input side, and norms of queries and of the one key head."""
MODELS: dict[str, dict[str, Any]] = {
    "kosmos_x": {
        "model__decoder__num_query_groups": 4,
        "model__decoder__positions": "learned",
        "model__resampler__query_key_gain": 3.0,
        "model__resampler__head_size": 24,
    },
    "kosmos_2": KOSMOS_2,
}
GROUPS = {"kosmos_x": 4, "kosmos_2": 1}
INNER = 2 * 24
MAGNETO = math.sqrt(math.log(2 * LAYERS))


@dataclass(frozen=True)
class Normal:
    std: float

    def check(self, tensor: Tensor) -> None:
        size = tensor.numel()
        assert abs(tensor.mean()) < 5 * self.std / math.sqrt(size)
        assert abs(tensor.std() / self.std - 1) < 5 / math.sqrt(2 * size)


@dataclass(frozen=True)
class Uniform:
    """Between -bound and bound; small tensors are checked for their bounds only loosely."""

    bound: float

    def check(self, tensor: Tensor) -> None:
        size = tensor.numel()
        assert self.bound * (1 - 8 / size) < tensor.abs().max() <= self.bound * (1 + 1e-6)
        assert abs(tensor.mean()) < 5 * self.bound / math.sqrt(3 * size)
        assert abs(tensor.std() * math.sqrt(3) / self.bound - 1) < 5 / math.sqrt(2 * size)


@dataclass(frozen=True)
class Constant:
    value: float

    def check(self, tensor: Tensor) -> None:
        assert torch.equal(tensor, torch.full_like(tensor, self.value))


VISION_NARROW = E**-0.5 * (2 * 3) ** -0.5
Family = Normal | Uniform | Constant
SHARED: dict[str, Family] = {
    r".*(norm|layernorm|layrnorm|layer_norm\d)\.weight": Constant(1.0),
    r".*(norm|layernorm|layrnorm|layer_norm\d)\.bias": Constant(0.0),
    r"decoder\..*\.linear_proj\.(weight|bias)": Uniform(MAGNETO / math.sqrt(D)),
    r"decoder\..*\.linear_fc1\.(weight|bias)": Uniform(MAGNETO / math.sqrt(D)),
    r"decoder\..*\.linear_fc2\.(weight|bias)": Uniform(MAGNETO / math.sqrt(F)),
    r"vision_tower\.embeddings\.class_embedding": Normal(E**-0.5),
    r"vision_tower\.embeddings\.(patch|position)_embedding\.weight": Normal(0.02),
    r"vision_tower\..*\.[qkv]_proj\.weight": Normal(VISION_NARROW),
    r"vision_tower\..*\.out_proj\.weight": Normal(E**-0.5),
    r"vision_tower\..*\.fc1\.weight": Normal((2 * E) ** -0.5),
    r"vision_tower\..*\.fc2\.weight": Normal(VISION_NARROW),
    r"vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.bias": Constant(0.0),
}
PERCEIVER: dict[str, Family] = {
    r"embedding\.position_embeddings\.weight": Normal(D**-0.5),
    r"resampler\.(latents|frame_embedding)": Normal(1.0),
    r"resampler\..*\.to_q\.weight": Uniform(3.0 / math.sqrt(E)),
    r"resampler\..*\.to_out\.weight": Uniform(1 / math.sqrt(INNER)),
    r"resampler\..*\.ffn\.fc1\.weight": Uniform(1 / math.sqrt(E)),
    r"resampler\..*\.ffn\.fc2\.weight": Uniform(1 / math.sqrt(4 * E)),
    r"resampler\.projection\.weight": Normal(D**-0.5),
}
CROSS_ATTENTION: dict[str, Family] = {
    r"resampler\.latents": Normal(1.0),
    r"resampler\.projection\.(weight|bias)": Uniform(1 / math.sqrt(E)),
    r"resampler\.attention\.[qkv]_proj\.weight": Uniform(math.sqrt(6 / (D + D)) / math.sqrt(2)),
    r"resampler\.attention\.out_proj\.weight": Uniform(math.sqrt(6 / (D + D))),
    r"resampler\.attention\.[qkv]_proj\.bias": Uniform(1 / math.sqrt(D)),
    r"resampler\.attention\.out_proj\.bias": Constant(0.0),
}
FAMILIES = {"kosmos_x": SHARED | PERCEIVER, "kosmos_2": SHARED | CROSS_ATTENTION}
"""What a family of whole tensors looks like. Those with several parts have tests of their own."""
IN_PARTS = (
    r"embedding\.word_embeddings\.weight",
    r"output_layer\.weight",
    r"decoder\..*\.linear_qkv\.(weight|bias)",
    r"resampler\..*\.to_kv\.weight",
)


def initialized(run: RunConfig) -> dict[str, list[Tensor]]:
    """Return every parameter, whole, by global name: a list, since a tied embedding may be there twice."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    weights: dict[str, list[Tensor]] = {}
    for chunk in build_chunks(run, derive_transformer_config(run), topology):
        initialize(chunk, run.training.seed)
        for named in named_parameters(chunk):
            weights.setdefault(named.name, []).append(gather(named.parameter.detach(), named.shard_dim, topology))
    return weights


@cache
def wide_model(model: str) -> Mapping[str, Tensor]:
    weights = run_ranks(initialized, 1, tiny_run(**WIDE, **MODELS[model], training__seed=SEED))[0]
    return {name: copies[0] for name, copies in weights.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(("model", "family"), [(model, family) for model in MODELS for family in FAMILIES[model]])
def test_family_follows_its_formula(model: str, family: str) -> None:
    members = [tensor for name, tensor in wide_model(model).items() if re.fullmatch(family, name)]
    assert members
    FAMILIES[model][family].check(torch.cat([tensor.flatten() for tensor in members]))


@pytest.mark.distributed
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_of_one_family(model: str) -> None:
    for name in wide_model(model):
        families = [pattern for pattern in (*FAMILIES[model], *IN_PARTS) if re.fullmatch(pattern, name)]
        assert len(families) == 1, (name, families)


@pytest.mark.distributed
def test_norms_of_queries_and_keys_are_there() -> None:
    norms = [name for name in wide_model("kosmos_2") if re.search(r"\.[qk]_layernorm\.", name)]
    assert len(norms) == 4 * LAYERS


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("model", MODELS)
def test_values_are_scaled_as_magneto_says_and_queries_and_keys_are_not(model: str, kind: str) -> None:
    fused = [tensor for name, tensor in wide_model(model).items() if name.endswith(f"linear_qkv.{kind}")]
    assert len(fused) == LAYERS
    groups = GROUPS[model]
    heads = torch.stack(fused).unflatten(1, (groups, HEADS // groups + 2, D // HEADS))
    Uniform(1 / math.sqrt(D)).check(heads[:, :, :-2])  # queries
    Uniform(1 / math.sqrt(D)).check(heads[:, :, -2])  # keys
    Uniform(MAGNETO / math.sqrt(D)).check(heads[:, :, -1])  # values


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
@pytest.mark.parametrize("model", MODELS)
def test_rows_of_ids_that_do_not_exist_are_zero(model: str, name: str) -> None:
    """Scaled embeddings start like others: N(0, 1/D), which sqrt(D) then makes N(0, 1)."""
    matrix = wide_model(model)[name]
    assert matrix.shape[0] == 96
    Normal(D**-0.5).check(matrix[:VOCAB])
    assert (matrix[:VOCAB].norm(dim=1) > 0).all()
    Constant(0.0).check(matrix[VOCAB:])


@pytest.mark.distributed
def test_the_resampler_s_keys_have_the_gain_and_its_values_not() -> None:
    for name, tensor in wide_model("kosmos_x").items():
        if name.endswith("to_kv.weight"):
            Uniform(3.0 / math.sqrt(E)).check(tensor[:INNER])
            Uniform(1 / math.sqrt(E)).check(tensor[INNER:])


@pytest.mark.distributed
@pytest.mark.parametrize("model", MODELS)
def test_no_two_parameters_are_drawn_alike(model: str) -> None:
    drawn = [tensor.flatten()[:8] for tensor in wide_model(model).values() if tensor.std() > 0]
    assert len({tuple((first / first.abs().max()).tolist()) for first in drawn}) == len(drawn)


def test_padding_does_not_change_the_rows_of_real_ids() -> None:
    small, large = (model_of(model__decoder__vocab_multiple=multiple) for multiple in (8, 128))
    name = "output_layer.weight"
    first = initial_tensor(name, (96, 32), small, SEED)[:VOCAB]
    assert torch.equal(first, initial_tensor(name, (128, 32), large, SEED)[:VOCAB])


def test_configured_spreads_are_used() -> None:
    model = model_of(model__decoder__embedding_std=0.5, model__vision__position_embedding_std=0.3)
    Normal(0.5).check(initial_tensor("embedding.word_embeddings.weight", (96, 32), model, SEED)[:VOCAB])
    Normal(0.5).check(initial_tensor("embedding.position_embeddings.weight", (24, 32), model, SEED))
    Normal(0.3).check(initial_tensor("vision_tower.embeddings.position_embedding.weight", (5, 64), model, SEED))
    Normal(32**-0.5).check(initial_tensor("output_layer.weight", (96, 32), model, SEED)[:VOCAB])


def model_of(**changes: Any) -> ModelConfig:
    return tiny_run(**changes).model


def test_a_name_without_a_rule_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"no initialization rule for parameter decoder\.layers\.0\.new\.weight"):
        initial_tensor("decoder.layers.0.new.weight", (2, 2), model_of(), SEED)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel__tensor_parallel_size": 2}),
    "tp4": (4, {"parallel__tensor_parallel_size": 4}),
    "pp2": (2, {"parallel__pipeline_parallel_size": 2}),
    "dp2": (2, {}),
    "pp2_vpp2": (2, {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2}),
    "tp2_dp2": (4, {"parallel__tensor_parallel_size": 2}),
    "tp2_pp2_vpp2": (
        4,
        {
            "parallel__tensor_parallel_size": 2,
            "parallel__pipeline_parallel_size": 2,
            "parallel__virtual_pipeline_parallel_size": 2,
        },
    ),
}


NETWORKS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"model__decoder__tie_embeddings": True},
    "kosmos_2": KOSMOS_2,
}
"""With kosmos_2's one key head, four tensor ranks cut the fused rows within heads."""


@cache
def one_process(network: str) -> Mapping[str, list[Tensor]]:
    weights: dict[str, list[Tensor]] = run_ranks(initialized, 1, tiny_run(**NETWORKS[network]))[0]
    return weights


@pytest.mark.distributed
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_seed_gives_the_same_weights_under_every_layout(layout: str, network: str) -> None:
    world_size, changes = LAYOUTS[layout]
    reference = one_process(network)
    seen = set()
    num_copies = 0
    for weights in run_ranks(initialized, world_size, tiny_run(**NETWORKS[network], **changes)):
        for name, copies in weights.items():
            for tensor in copies:
                assert torch.equal(tensor, reference[name][0]), name
        seen |= weights.keys()
        num_copies += "embedding.word_embeddings.weight" in weights
    assert seen == reference.keys()
    holds_everywhere = network == "tied" or "pp2" not in layout
    assert num_copies == (world_size if holds_everywhere else world_size // 2)


@pytest.mark.distributed
def test_another_seed_gives_other_weights() -> None:
    other = run_ranks(initialized, 1, tiny_run(training__seed=2))[0]
    for name, (tensor,) in one_process("untied").items():
        is_constant = tensor.numel() == 0 or tensor.std() == 0
        assert torch.equal(other[name][0], tensor) == is_constant, name
