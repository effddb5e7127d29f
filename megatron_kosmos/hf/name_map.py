"""Which parameter of the training model is which of the exported one, as a table that converts both ways.

Shape letters: D decoder width, K head size, H heads, G query groups (heads of keys and values), V vocabulary,
Vp vocabulary padded to the training model's multiple.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration

SAME_NAME_PREFIXES = ("vision_tower.", "resampler.")
"""Parts that both models name alike."""

DECODER_RENAMES = {
    "embedding.position_embeddings": "text_model.model.embed_positions",
    "decoder.final_layernorm": "text_model.model.layer_norm",
}
VOCABULARY_RENAMES = {
    "embedding.word_embeddings": "text_model.model.embed_tokens",
    "output_layer": "text_model.lm_head",
}
"""Rows past the vocabulary exist only in training."""

LAYER_RENAMES = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attention.q_layernorm": "self_attn.q_layernorm",
    "self_attention.k_layernorm": "self_attn.k_layernorm",
    "self_attention.linear_proj.norm": "self_attn.inner_attn_ln",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "final_layer_norm",
    "mlp.linear_fc1": "ffn.fc1",
    "mlp.linear_fc2.norm": "ffn.ffn_layernorm",
    "mlp.linear_fc2": "ffn.fc2",
}
FUSED_QKV = "self_attention.linear_qkv"
SPLIT_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

Shape = tuple[int, ...]


class NameMapError(ValueError):
    """Tensors that do not fit the model; the message lists every missing, left-over and misshaped one."""


@dataclass(frozen=True)
class Entry:
    """One training tensor and the exported tensors that hold the same numbers."""

    training_name: str
    training_shape: Shape
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    """Training tensor to exported tensors, in the order of `hf_names`; views where possible."""
    join: Callable[..., Tensor]
    """The inverse: exported tensors, in the order of `hf_names`, to the training tensor."""


def split_qkv(fused: Tensor, num_groups: int, head_size: int) -> tuple[Tensor, ...]:
    """Cut megatron's [G * (H/G + 2) * K, …], each group's query heads, key head and value head, into q, k and v."""
    grouped = fused.unflatten(0, (num_groups, -1, head_size))
    return tuple(part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]))


def join_qkv(query: Tensor, key: Tensor, value: Tensor, num_groups: int, head_size: int) -> Tensor:
    """Undo `split_qkv`."""
    parts = [part.unflatten(0, (num_groups, -1, head_size)) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Append zero rows up to `num_rows`."""
    return torch.cat((rows, rows.new_zeros(num_rows - len(rows), *rows.shape[1:])))


def name_table(config: KosmosConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    """Return the whole correspondence for a model of these sizes, sorted by training name."""
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape) for name, tensor in KosmosForConditionalGeneration(config).named_parameters()
        }
    to_training = _renames(config)
    entries = []
    for hf_name, shape in shapes.items():
        module, _, leaf = hf_name.rpartition(".")
        if hf_name.startswith(SAME_NAME_PREFIXES):
            entries.append(_copy(hf_name, shape, hf_name))
        elif module in VOCABULARY_RENAMES.values():
            entries.append(_vocabulary(f"{to_training[module]}.{leaf}", shape, hf_name, padded_vocab_size))
        elif module.endswith(SPLIT_QKV[0]):
            entries.append(_fused_qkv(f"{to_training[module]}.{leaf}", shape, hf_name, config))
        elif not module.endswith(SPLIT_QKV[1:]):
            entries.append(_copy(f"{to_training[module]}.{leaf}", shape, hf_name))
    return tuple(sorted(entries, key=lambda entry: entry.training_name))


def check_names(expected: Mapping[str, Shape], found: Mapping[str, Shape], origin: str) -> None:
    """Raise NameMapError listing every difference between the `expected` tensors and those `found` in `origin`."""
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"left over: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"differs in shape: {name} is {list(found[name])}, the model wants {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise NameMapError(f"{origin} does not fit the model of its configuration:\n  " + "\n  ".join(problems))


def _renames(config: KosmosConfig) -> dict[str, str]:
    """Return the training name of every exported decoder module; the fused projection goes by its query part."""
    pairs = DECODER_RENAMES | VOCABULARY_RENAMES
    for i in range(config.num_hidden_layers):
        for training, exported in (LAYER_RENAMES | {FUSED_QKV: SPLIT_QKV[0]}).items():
            pairs[f"decoder.layers.{i}.{training}"] = f"text_model.model.layers.{i}.{exported}"
    return {exported: training for training, exported in pairs.items()}


def _copy(training_name: str, shape: Shape, hf_name: str) -> Entry:
    return Entry(training_name, shape, (hf_name,), (shape,), lambda tensor: (tensor,), lambda tensor: tensor)


def _vocabulary(training_name: str, shape: Shape, hf_name: str, padded_vocab_size: int) -> Entry:
    vocab_size = shape[0]
    return Entry(
        training_name,
        (padded_vocab_size, *shape[1:]),
        (hf_name,),
        (shape,),
        lambda tensor: (tensor[:vocab_size],),
        partial(pad_rows, num_rows=padded_vocab_size),
    )


def _fused_qkv(training_name: str, query_shape: Shape, query_name: str, config: KosmosConfig) -> Entry:
    num_groups, head_size = config.num_key_value_heads, config.head_dim
    rows = [heads * head_size for heads in (config.num_attention_heads, num_groups, num_groups)]
    return Entry(
        training_name,
        (sum(rows), *query_shape[1:]),
        tuple(query_name.replace(SPLIT_QKV[0], part) for part in SPLIT_QKV),
        tuple((number, *query_shape[1:]) for number in rows),
        partial(split_qkv, num_groups=num_groups, head_size=head_size),
        partial(join_qkv, num_groups=num_groups, head_size=head_size),
    )


__all__ = ["Entry", "NameMapError", "check_names", "name_table"]
