"""The table of names: complete, reversible to the bit, and errors that list everything."""

import pytest
import torch

from megatron_kosmos.hf.name_map import NameMapError, check_names, join_qkv, name_table, split_qkv
from tests.unit.hf.tiny import VARIANTS, VOCAB, tiny_config, tiny_model

PADDED = 64


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_there_and_back_changes_no_bit(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    table = name_table(model.config, PADDED)
    exported = dict(model.named_parameters())
    assert sorted(name for entry in table for name in entry.hf_names) == sorted(exported)
    for entry in table:
        training = entry.join(*(exported[name] for name in entry.hf_names))
        assert tuple(training.shape) == entry.training_shape
        for name, back in zip(entry.hf_names, entry.split(training), strict=True):
            assert torch.equal(back, exported[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_training_tensor_comes_back_but_for_the_padding(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    for entry in name_table(config, PADDED):
        training = torch.randn(entry.training_shape)
        back = entry.join(*entry.split(training))
        if entry.training_shape[0] == PADDED and entry.training_name.endswith(
            ("word_embeddings.weight", "output_layer.weight")
        ):
            assert torch.equal(back[:VOCAB], training[:VOCAB])
            assert not back[VOCAB:].any()
        else:
            assert torch.equal(back, training)


def test_training_names_are_those_of_the_contract() -> None:
    names = {entry.training_name for entry in name_table(tiny_config(positions="learned", query_key_norm=True), PADDED)}
    for expected in (
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "output_layer.weight",
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "decoder.layers.1.self_attention.linear_proj.norm.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.1.self_attention.k_layernorm.bias",
        "decoder.layers.0.mlp.linear_fc2.norm.bias",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.final_layernorm.bias",
        "resampler.layers.1.attention.to_kv.weight",
        "resampler.frame_embedding",
        "vision_tower.encoder.layers.1.mlp.fc1.weight",
    ):
        assert expected in names
    kosmos2 = {entry.training_name for entry in name_table(tiny_config(**VARIANTS["kosmos2"]), PADDED)}
    attention = {
        f"resampler.attention.{part}_proj.{leaf}" for part in ("q", "k", "v", "out") for leaf in ("weight", "bias")
    }
    assert {name for name in kosmos2 if name.startswith("resampler.")} == {
        *attention,
        "resampler.latents",
        "resampler.projection.weight",
        "resampler.projection.bias",
    }
    assert not [name for name in kosmos2 if "position_embeddings" in name]  # sinusoids are computed
    tied = {entry.training_name for entry in name_table(tiny_config(tie_word_embeddings=True), PADDED)}
    assert "output_layer.weight" not in tied


def test_each_group_holds_its_query_heads_then_key_then_value() -> None:
    # 2 groups of 2 query heads of size 1: rows are q0 q1 k0 v0, q2 q3 k1 v1.
    fused = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21])
    query, key, value = split_qkv(fused, num_groups=2, head_size=1)
    assert (query.tolist(), key.tolist(), value.tolist()) == ([0, 1, 2, 3], [10, 11], [20, 21])
    assert torch.equal(join_qkv(query, key, value, num_groups=2, head_size=1), fused)


def test_every_difference_is_listed() -> None:
    expected: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4,), "c": (5,)}
    check_names(expected, dict(expected), "here")
    with pytest.raises(NameMapError) as caught:
        check_names(expected, {"a": (3, 2), "c": (5,), "d": (1,), "e": (2, 2)}, "the checkpoint /x")
    message = str(caught.value)
    assert message.startswith("the checkpoint /x does not fit")
    for line in ("missing: b [4]", "left over: d [1]", "left over: e [2, 2]", "a is [3, 2], the model wants [2, 3]"):
        assert line in message
    assert " c " not in message
