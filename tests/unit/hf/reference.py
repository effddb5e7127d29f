"""KOSMOS's mathematics once more, in float64 and the slow way: one row, no cache, one head at a time.

Written from the papers' formulas, not from the code under test: positions turn complex numbers, scores come from a loop
over heads, the causal mask from a triangle. Only CLIP and KOSMOS-2's sinusoids are transformers' own.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextSinusoidalPositionalEmbedding

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration


def reference_logits(model: KosmosForConditionalGeneration, row: Mapping[str, Tensor]) -> Tensor:
    """Return logits [T, V] of one unpadded row."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    states = weights["text_model.model.embed_tokens.weight"][row["input_ids"][0]].clone()
    if "pixel_values" in row:
        slots = row["image_embeds_position_mask"][0].bool()
        states[slots] = torch.cat([_image(model, weights, image) for image in row["pixel_values"]])
    if config.scale_embeddings:
        states = states * math.sqrt(config.hidden_size)
    if config.positions == "sinusoidal":
        sinusoids = Kosmos2TextSinusoidalPositionalEmbedding(len(states), config.hidden_size, padding_idx=1)
        states = states + sinusoids(inputs_embeds=states[None])[0]
    if config.positions == "learned":
        states = states + weights["text_model.model.embed_positions.weight"][: len(states)]
    for layer in range(config.num_hidden_layers):
        states = _decoder_layer(model, weights, f"text_model.model.layers.{layer}.", states)
    return _norm(weights, "text_model.model.layer_norm.", states) @ weights["text_model.lm_head.weight"].T


def _decoder_layer(
    model: KosmosForConditionalGeneration, weights: dict[str, Tensor], name: str, states: Tensor
) -> Tensor:
    config = model.config
    size, length = config.hidden_size // config.num_attention_heads, len(states)
    normed = _norm(weights, name + "self_attn_layer_norm.", states)
    query, key, value = (_linear(weights, f"{name}self_attn.{part}_proj.", normed) for part in "qkv")
    shared_by = config.num_attention_heads // config.num_key_value_heads
    heads = []
    for head in range(config.num_attention_heads):
        q = query[:, head * size : (head + 1) * size]
        k = key[:, head // shared_by * size : (head // shared_by + 1) * size]
        v = value[:, head // shared_by * size : (head // shared_by + 1) * size]
        if config.query_key_norm:
            q, k = (
                _norm(weights, f"{name}self_attn.q_layernorm.", q),
                _norm(weights, f"{name}self_attn.k_layernorm.", k),
            )
        scores = _xpos_scores(q, k) if config.xpos else q @ k.T
        future = torch.ones(length, length).triu(1).bool()
        heads.append((scores / math.sqrt(size)).masked_fill(future, -math.inf).softmax(dim=-1) @ v)
    attended = _norm(weights, name + "self_attn.inner_attn_ln.", torch.cat(heads, dim=-1))
    states = states + _linear(weights, name + "self_attn.out_proj.", attended)
    hidden = _gelu(_linear(weights, name + "ffn.fc1.", _norm(weights, name + "final_layer_norm.", states)))
    return states + _linear(weights, name + "ffn.fc2.", _norm(weights, name + "ffn.ffn_layernorm.", hidden))


def _xpos_scores(query: Tensor, key: Tensor) -> Tensor:
    """Score by distance (arXiv 2212.10554, equation 12): Re(q conj(k) e^{i d theta}) zeta^{d / 512}."""
    length, size = query.shape
    pairs = torch.arange(size // 2, dtype=torch.float64)
    theta = 10000 ** (-2 * pairs / size)
    zeta = (pairs / (size / 2) + 0.4) / 1.4
    distance = torch.arange(length)[:, None, None] - torch.arange(length)[None, :, None]
    turn = torch.polar(zeta ** (distance / 512), distance * theta)
    q, k = (torch.view_as_complex(x.reshape(length, -1, 2).contiguous()) for x in (query, key))
    return (q[:, None] * k[None].conj() * turn).real.sum(dim=-1)


def _image(model: KosmosForConditionalGeneration, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """Return the embeddings [L, D] of an image [3, S, S]."""
    config = model.config
    tower = type(model.vision_tower)(config.vision_config).double()
    tower.load_state_dict(model.vision_tower.state_dict())
    features = tower(image[None].double()).last_hidden_state[0]
    if config.vision_features == "normalized":
        features = _norm(weights, "vision_tower.post_layernorm.", features)
        features = features / features.square().sum(dim=-1, keepdim=True).sqrt()
    if config.resampler == "perceiver":
        return _perceive(config, weights, features)
    latents = weights["resampler.latents"]
    target = torch.cat((_linear(weights, "resampler.projection.", features), latents))
    query, key, value = (
        _linear(weights, f"resampler.attention.{part}_proj.", states)
        for part, states in (("q", latents), ("k", target), ("v", target))
    )
    size = config.hidden_size // config.resampler_num_heads
    return _linear(weights, "resampler.attention.out_proj.", _attend(query, key, value, size))


def _attend(query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
    """Return what queries [L, H * size] read from [N, H * size], one head after another."""
    slices = [slice(start, start + size) for start in range(0, query.shape[-1], size)]
    heads = [((query[:, s] @ key[:, s].T) * size**-0.5).softmax(dim=-1) @ value[:, s] for s in slices]
    return torch.cat(heads, dim=-1)


def _perceive(config: KosmosConfig, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """Return the embeddings [L, D] of features [P, E] (arXiv 2204.14198, section 3.1.1)."""
    media = features + weights["resampler.frame_embedding"]
    latents = weights["resampler.latents"]
    size = config.resampler_head_size
    inner = config.resampler_num_heads * size
    for layer in range(config.resampler_depth):
        name = f"resampler.layers.{layer}."
        source = _norm(weights, name + "attention.latents_norm.", latents)
        target = torch.cat((_norm(weights, name + "attention.media_norm.", media), source))
        query = source @ weights[name + "attention.to_q.weight"].T
        key, value = (target @ weights[name + "attention.to_kv.weight"].T).split(inner, dim=-1)
        latents = latents + _attend(query, key, value, size) @ weights[name + "attention.to_out.weight"].T
        hidden = _norm(weights, name + "ffn.norm.", latents) @ weights[name + "ffn.fc1.weight"].T
        latents = latents + _gelu(hidden) @ weights[name + "ffn.fc2.weight"].T
    return _norm(weights, "resampler.norm.", latents) @ weights["resampler.projection.weight"].T


def _linear(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    return states @ weights[name + "weight"].T + weights[name + "bias"]


def _norm(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    centred = states - states.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    return centred * scale * weights[name + "weight"] + weights[name + "bias"]


def _gelu(states: Tensor) -> Tensor:
    return states * 0.5 * (1 + torch.erf(states / math.sqrt(2)))
