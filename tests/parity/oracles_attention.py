"""transformers' attentions with what torchscale's lacks, norms of queries and keys and heads that share keys and
values, and how their weights are named here.

Their rotations are switched off by an angle of zero, and their output projection gets Magneto's norm before it. They
run by torch's scaled-dot-product attention, since their eager ones have a softmax in fp32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PersimmonConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.persimmon.modeling_persimmon import PersimmonAttention
from transformers.models.phi.modeling_phi import PhiAttention

from megatron_kosmos.config import DecoderConfig
from tests.parity.oracles import randomized

ORACLES = {"Llama": LlamaAttention, "Persimmon": PersimmonAttention, "Phi": PhiAttention}
_CONFIGS = {"Llama": LlamaConfig, "Persimmon": PersimmonConfig, "Phi": PhiConfig}


def attention(kind: str, decoder: DecoderConfig, seed: int) -> nn.Module:
    """Return the attention of the same sizes in fp64, no parameter of which is at a trivial value."""
    config = _CONFIGS[kind](
        hidden_size=decoder.width,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_query_groups or decoder.num_heads,
        attention_bias=True,
        qk_layernorm=decoder.query_key_norm,
        layer_norm_eps=decoder.layer_norm_epsilon,
        attn_implementation="sdpa",
    )
    oracle: nn.Module = ORACLES[kind](config, layer_idx=0)
    projection = "o_proj" if kind == "Llama" else "dense"
    norm = nn.LayerNorm(decoder.width, decoder.layer_norm_epsilon)
    setattr(oracle, projection, nn.Sequential(norm, getattr(oracle, projection)))
    return randomized(oracle.double().eval(), seed)


def attend(oracle: Any, hidden_BTD: Tensor) -> Tensor:
    """Return what `oracle` makes of hidden states, causally and whatever their positions."""
    rotated = getattr(oracle, "rotary_ndims", oracle.head_dim)  # columns of a head
    angle = torch.zeros(*hidden_BTD.shape[:2], rotated, dtype=hidden_BTD.dtype)
    output: Tensor = oracle(hidden_BTD, position_embeddings=(angle.cos(), angle.sin()), attention_mask=None)[0]
    return output


def attention_names(tensors: Mapping[str, Tensor], decoder: DecoderConfig) -> dict[str, Tensor]:
    """Rename an attention's whole tensors, weights and gradients alike, to our names. Every one is used."""
    left = {name.replace("o_proj.", "dense."): tensor for name, tensor in tensors.items()}
    renamed = {}
    for kind in ("weight", "bias"):
        if f"query_key_value.{kind}" in left:  # head by head its query, its key, its value, as megatron-core has them
            renamed[f"linear_qkv.{kind}"] = left.pop(f"query_key_value.{kind}")
        else:
            renamed[f"linear_qkv.{kind}"] = _fused([left.pop(f"{part}_proj.{kind}") for part in "qkv"], decoder)
        renamed[f"linear_proj.norm.{kind}"] = left.pop(f"dense.0.{kind}")
        renamed[f"linear_proj.{kind}"] = left.pop(f"dense.1.{kind}")
        if decoder.query_key_norm:
            for norm in ("q_layernorm", "k_layernorm"):
                renamed[f"{norm}.{kind}"] = left.pop(f"{norm}.{kind}")
    assert not left, f"unused: {left.keys()}"
    return {f"decoder.layers.0.self_attention.{name}": tensor for name, tensor in renamed.items()}


def _fused(projections: list[Tensor], decoder: DecoderConfig) -> Tensor:
    """Return megatron-core's rows: group by group its queries, its key, its value."""
    num_groups = decoder.num_query_groups or decoder.num_heads
    return torch.cat([rows.unflatten(0, (num_groups, -1)) for rows in projections], dim=1).flatten(0, 1)
