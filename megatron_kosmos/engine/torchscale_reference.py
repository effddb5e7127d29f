"""Kosmos-X's mathematics on the tensors of its state dict: what a conversion from torchscale is compared with.

Written from torchscale 0.3.0 and flamingo-pytorch, none of which a conversion needs, and apart from this package's
model: positions are centred anew for every length, queries, keys and values are apart.

Shape letters: B rows, T tokens, D decoder width, H heads, K head size, I images, P patches, E vision width, L latents.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import DecoderConfig, ModelConfig, PerceiverConfig
from megatron_kosmos.hf.torchscale_names import DECODER, FIRST_ROW, FRAMES, OUTPUT, POSITIONS, RESAMPLER, TOWER
from megatron_kosmos.model.vision import clip_config

LATENT_NORM_EPSILON = 1e-5

Tensors = Mapping[str, Tensor]


@torch.no_grad()
def torchscale_logits(model: ModelConfig, tensors: Tensors, batch: MultimodalBatch) -> Tensor:
    """Return the logits [B, T, V] of a Kosmos-X model, in fp32."""
    decoder, length = model.decoder, batch.input_ids.shape[1]
    hidden = F.embedding(batch.input_ids, tensors[DECODER + "embed_tokens.weight"].float())
    hidden[batch.slots(model.resampler.num_latents)] = image_embeddings(model, tensors, batch.images).flatten(0, 1)
    if decoder.scale_embeddings:
        hidden = hidden * math.sqrt(decoder.width)
    if decoder.positions == "learned":
        hidden = hidden + tensors[POSITIONS].float()[FIRST_ROW : FIRST_ROW + length]
    for number in range(decoder.num_layers):
        hidden = _layer(decoder, tensors, f"{DECODER}layers.{number}.", hidden)
    hidden = _norm(tensors, DECODER + "layer_norm", hidden, decoder.layer_norm_epsilon)
    output = DECODER + "embed_tokens.weight" if decoder.tie_embeddings else OUTPUT
    return F.linear(hidden, tensors[output].float())


def image_embeddings(model: ModelConfig, tensors: Tensors, images: Tensor) -> Tensor:
    """Return the embeddings [I, L, D] of images [I, 3, S, S]."""
    tower = CLIPVisionModel(clip_config(model.vision)).eval()
    named = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    tower.load_state_dict({name: tensor.float() for name, tensor in named.items()})
    assert isinstance(model.resampler, PerceiverConfig)
    patches = tower(images).last_hidden_state
    return _linear(tensors, "image_proj", _perceive(model.resampler, tensors, patches))


def _layer(decoder: DecoderConfig, tensors: Tensors, name: str, hidden: Tensor) -> Tensor:
    """Return the hidden states [B, T, D] after a layer."""
    epsilon = decoder.layer_norm_epsilon
    normed = _norm(tensors, f"{name}self_attn_layer_norm", hidden, epsilon)
    query, key, value = (
        _linear(tensors, f"{name}self_attn.{part}_proj", normed).unflatten(-1, (decoder.num_heads, -1)).transpose(1, 2)
        for part in "qkv"
    )
    query = query * decoder.head_size**-0.5
    if decoder.xpos:
        query, key = _rotated(query, downscale=False), _rotated(key, downscale=True)
    future = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).triu(1)
    weights = (query @ key.transpose(-1, -2)).masked_fill(future, -math.inf).softmax(dim=-1)
    attended = (weights @ value).transpose(1, 2).flatten(-2)
    attended = _norm(tensors, f"{name}self_attn.inner_attn_ln", attended, epsilon)
    hidden = hidden + _linear(tensors, f"{name}self_attn.out_proj", attended)
    normed = _norm(tensors, f"{name}final_layer_norm", hidden, epsilon)
    inner = F.gelu(_linear(tensors, f"{name}ffn.fc1", normed))
    inner = _norm(tensors, f"{name}ffn.ffn_layernorm", inner, epsilon)
    return hidden + _linear(tensors, f"{name}ffn.fc2", inner)


def _rotated(states: Tensor, downscale: bool) -> Tensor:
    """Apply xPos (arXiv 2212.10554) to [B, H, T, K], its scale centred in the T tokens as torchscale's is."""
    length, size = states.shape[-2:]
    pairs = torch.arange(0, size, 2)
    position = torch.arange(length)
    zeta = (pairs + 0.4 * size) / (1.4 * size)
    scale = zeta ** ((position - (length + 1) // 2) / 512)[:, None]
    angle = position[:, None] * 10_000.0 ** (-pairs / size)
    turn = torch.polar(1 / scale if downscale else scale, angle)
    paired = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(paired * turn).flatten(-2)


def _perceive(config: PerceiverConfig, tensors: Tensors, patches: Tensor) -> Tensor:
    """Return flamingo's resampled features [I, L, E] of patch features [I, P, E]."""
    media = patches + tensors[FRAMES].float()[0, 0]
    latents = tensors[RESAMPLER + "latents"].float().expand(len(patches), -1, -1)
    for number in range(config.depth):
        name = f"{RESAMPLER}layers.{number}."
        source = _norm(tensors, f"{name}0.norm_latents", latents, LATENT_NORM_EPSILON)
        target = torch.cat((_norm(tensors, f"{name}0.norm_media", media, LATENT_NORM_EPSILON), source), dim=1)
        key, value = _linear(tensors, f"{name}0.to_kv", target).chunk(2, dim=-1)
        query, key, value = (
            states.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
            for states in (_linear(tensors, f"{name}0.to_q", source) * config.head_size**-0.5, key, value)
        )
        read = (query @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        latents = latents + _linear(tensors, f"{name}0.to_out", read.transpose(1, 2).flatten(-2))
        inner = F.gelu(_linear(tensors, f"{name}1.1", _norm(tensors, f"{name}1.0", latents, LATENT_NORM_EPSILON)))
        latents = latents + _linear(tensors, f"{name}1.3", inner)
    return _norm(tensors, RESAMPLER + "norm", latents, LATENT_NORM_EPSILON)


def _linear(tensors: Tensors, name: str, states: Tensor) -> Tensor:
    bias = tensors.get(f"{name}.bias")
    return F.linear(states, tensors[f"{name}.weight"].float(), None if bias is None else bias.float())


def _norm(tensors: Tensors, name: str, states: Tensor, epsilon: float) -> Tensor:
    weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
    return F.layer_norm(states, weight.shape, weight, bias, epsilon)
