"""The text side of KOSMOS: a causal Magneto decoder, whose keys are cached normalized and rotated.

Exported folders carry this file: it imports nothing but torch and transformers.

Shape letters: B rows, T tokens of this call, C tokens in the cache and of this call, D decoder width, H heads,
G heads of keys and values, K head size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_kosmos import KosmosConfig

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache of keys and values, in arguments and outputs: `cache` since 5.24."""

XPOS_SCALE_BASE = 512
"""Tokens over which xPos decays by one factor zeta (torchscale's `scale_base`)."""
FIRST_SINUSOID = 2
"""Row of the first token among KOSMOS-2's sinusoids: fairseq keeps row 1 for padding."""


def xpos_tables(position_ids: Tensor, head_size: int, centre: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosine, sine and scale, each [B, 1, T, K/2] in float32, for positions [B, T].

    A score depends on the distance of its positions alone, so the centre only keeps the numbers small; being fixed,
    it lets keys be cached rotated (arXiv 2212.10554, section 3.2).
    """
    index = torch.arange(head_size // 2, dtype=torch.float32, device=position_ids.device)
    zeta = (2 * index + 0.4 * head_size) / (1.4 * head_size)
    frequency = 1.0 / 10_000 ** (index / (head_size // 2))
    positions = position_ids[:, None, :, None].float()
    angle = positions * frequency
    return angle.cos(), angle.sin(), zeta ** ((positions - centre) / XPOS_SCALE_BASE)


def rotate_pairs(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), … of the last axis of [B, H, T, K], in float32; the dtype stays."""
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return rotated.flatten(-2).to(states.dtype)


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """Return KOSMOS-2's embeddings [B, T, D] of positions [B, T], in float32: D/2 sines, then D/2 cosines.

    The values are those of transformers' Kosmos2TextSinusoidalPositionalEmbedding, computed and not stored.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=position_ids.device)
    frequency = torch.exp(index * -(math.log(10_000) / (half - 1)))
    angle = (position_ids + FIRST_SINUSOID).float()[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def eager_attention(
    module: "KosmosAttention", query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return attention output [B, T, H, K] and weights [B, H, T, C]; `attn_implementation="eager"` selects it."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * module.scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=kwargs["dropout"])
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KosmosAttention(nn.Module):
    """Causal attention with xPos and a LayerNorm before the output projection (sub-LN, arXiv 2210.06423)."""

    def __init__(self, config: KosmosConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        if config.query_key_norm:
            self.q_layernorm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
        self.inner_attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        xpos: tuple[Tensor, Tensor, Tensor] | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D] and the weights, where the implementation keeps them.

        `xpos` holds `xpos_tables`; None leaves queries and keys as they are.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.query_key_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if xpos is not None:
            cosine, sine, scale = xpos
            query = rotate_pairs(query, cosine * scale, sine * scale)
            key = rotate_pairs(key, cosine / scale, sine / scale)
        cache: Cache | None = kwargs.pop(CACHE_NAME, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.out_proj(self.inner_attn_ln(output.flatten(-2))), weights


class KosmosFeedForward(nn.Module):
    """Two projections with an exact GELU and a LayerNorm before the second (sub-LN)."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_layernorm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        return self.fc2(self.ffn_layernorm(nn.functional.gelu(self.fc1(hidden_states))))


class KosmosDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: KosmosConfig, layer_idx: int):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = KosmosAttention(config, layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = KosmosFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.ffn(self.final_layer_norm(hidden_states)))


class KosmosDecoder(nn.Module):
    """Embeddings, layers and the last LayerNorm."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(KosmosDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Map embeddings [B, T, D] at positions [B, T] to the normalized last states [B, T, D]."""
        config = self.config
        hidden_states = self.dropout(self._with_positions(inputs_embeds, position_ids))
        xpos = None
        if config.xpos:
            xpos = xpos_tables(position_ids, config.head_dim, config.max_position_embeddings // 2)
        mask = create_causal_mask(config, inputs_embeds, attention_mask, cache)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, xpos=xpos, **{CACHE_NAME: cache}, **kwargs)
        return self.layer_norm(hidden_states)

    def _with_positions(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Return embeddings [B, T, D], scaled where the model does so, with what it adds for positions [B, T]."""
        config = self.config
        if config.scale_embeddings:
            inputs_embeds = inputs_embeds * math.sqrt(config.hidden_size)
        if config.positions == "sinusoidal":
            return (inputs_embeds + sinusoids(position_ids, config.hidden_size)).to(inputs_embeds.dtype)
        if config.positions == "none":
            return inputs_embeds
        if int(position_ids.max()) >= config.max_position_embeddings:
            raise ValueError(
                f"position {int(position_ids.max())} has no embedding: this model has learned positions for "
                f"max_position_embeddings={config.max_position_embeddings} tokens; shorten the prompt or max_new_tokens"
            )
        return inputs_embeds + self.embed_positions(position_ids)


class KosmosTextModel(nn.Module):
    """The decoder and its output projection (names as in transformers' Kosmos2TextForCausalLM)."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        self.model = KosmosDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
