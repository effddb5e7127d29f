"""Initial weights: each parameter's whole tensor from (seed, its global name), of which a rank keeps its part.

One seed gives the same weights under every layout. Formulas: torchscale 0.3.0 for the decoder (its linear layers keep
torch's default, U(±1/√fan_in), and values, output projections and FFN are multiplied by √(ln 2L), arXiv 2210.06423
section 3.3), transformers' CLIP for the vision tower, flamingo-pytorch for the perceiver resampler, and for the
cross-attention one KOSMOS-2's release (microsoft/unilm, kosmos-2/unilm/models/connector.py: a linear layer as torch
makes it, N(0, 1) latents, fairseq's MultiheadAttention). Embeddings are N(0, 1/D) as fairseq's and the release's; where
`scale_embeddings` multiplies them by √D, the decoder so starts from N(0, 1).
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_kosmos.config import CrossAttentionConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import NamedParameter, named_parameters
from megatron_kosmos.model.pretrained_vision import pretrained_vision
from megatron_kosmos.parallel.randomness import derive_seed

Initializer = Callable[[Tensor, torch.Generator], Tensor]


def initialize(chunk: KosmosModel, seed: int) -> None:
    """Fill every parameter of `chunk` in place, on its device.

    With `vision.pretrained` the vision tower's weights come from that folder. Raises ConfigError where they can't.
    """
    model = chunk.model_config
    with torch.no_grad():
        for named in named_parameters(chunk):
            full = initial_tensor(named.name, _full_shape(named, chunk), model, seed)
            named.parameter.copy_(local_part(full, named.shard_dim, chunk))
        if chunk.chunk.is_first and model.vision.pretrained is not None:
            chunk.vision_tower.load_state_dict(pretrained_vision(model.vision, model.vision.pretrained))


def local_part(full: Tensor, shard_dim: int | None, chunk: KosmosModel) -> Tensor:
    """Return the part of a whole tensor that this tensor rank holds."""
    if shard_dim is None:
        return full
    return full.chunk(chunk.topology.tp_size, shard_dim)[chunk.topology.tp_rank]


def initial_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """Return the whole initial fp32 tensor of the parameter `name`. Raises KeyError for a name without a rule."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "initialization", name))
    for pattern, rule in _rules(model):
        if re.fullmatch(pattern, name):
            return rule(torch.empty(shape), generator)
    raise KeyError(f"no initialization rule for parameter {name}")


def _full_shape(named: NamedParameter, chunk: KosmosModel) -> tuple[int, ...]:
    shape = list(named.parameter.shape)
    if named.shard_dim is not None:
        shape[named.shard_dim] *= chunk.topology.tp_size
    return tuple(shape)


def _rules(model: ModelConfig) -> list[tuple[str, Initializer]]:
    """Pairs of a pattern over global names and how such a parameter starts; the first that matches counts."""
    return [
        (r".*(norm|layernorm|layrnorm|layer_norm\d)\.weight", _constant(1.0)),
        (r".*(norm|layernorm|layrnorm|layer_norm\d)\.bias", _constant(0.0)),
        *_decoder_rules(model.decoder),
        *_vision_rules(model.vision),
        *_resampler_rules(model),
    ]


def _decoder_rules(decoder: DecoderConfig) -> list[tuple[str, Initializer]]:
    gain = math.sqrt(math.log(2 * decoder.num_layers))
    embedding_std = decoder.embedding_std or decoder.width**-0.5
    embedding = _real_rows(decoder.vocab_size, _normal(embedding_std))
    layer = r"decoder\.layers\.\d+\."
    return [
        (r"embedding\.word_embeddings\.weight", embedding),
        (r"embedding\.position_embeddings\.weight", _normal(embedding_std)),
        (r"output_layer\.weight", _real_rows(decoder.vocab_size, _normal(decoder.width**-0.5))),
        (layer + r"self_attention\.linear_qkv\.(weight|bias)", _magneto_qkv(decoder, gain)),
        (layer + r"(self_attention\.linear_proj|mlp\.linear_fc1)\.(weight|bias)", _uniform(gain, decoder.width)),
        (layer + r"mlp\.linear_fc2\.(weight|bias)", _uniform(gain, decoder.ffn_width)),
    ]


def _vision_rules(vision: VisionConfig) -> list[tuple[str, Initializer]]:
    narrow = vision.width**-0.5 * (2 * vision.num_layers) ** -0.5
    layer = r"vision_tower\.encoder\.layers\.\d+\."
    return [
        (r"vision_tower\.embeddings\.class_embedding", _normal(vision.width**-0.5)),
        (r"vision_tower\.embeddings\.patch_embedding\.weight", _normal(0.02)),
        (r"vision_tower\.embeddings\.position_embedding\.weight", _normal(vision.position_embedding_std)),
        (layer + r"self_attn\.[qkv]_proj\.weight", _normal(narrow)),
        (layer + r"self_attn\.out_proj\.weight", _normal(vision.width**-0.5)),
        (layer + r"mlp\.fc1\.weight", _normal((2 * vision.width) ** -0.5)),
        (layer + r"mlp\.fc2\.weight", _normal(narrow)),
        (layer + r".*\.bias", _constant(0.0)),
    ]


def _resampler_rules(model: ModelConfig) -> list[tuple[str, Initializer]]:
    resampler, width = model.resampler, model.decoder.width
    if isinstance(resampler, CrossAttentionConfig):
        return [
            (r"resampler\.latents", _normal(1.0)),
            (r"resampler\.projection\.(weight|bias)", _uniform(1.0, model.vision.width)),
            # Xavier's bound of a square matrix, √(6 / 2D), times fairseq's gain for q, k and v, 1/√2.
            (r"resampler\.attention\.[qkv]_proj\.weight", _uniform(math.sqrt(3 / 2), width)),
            (r"resampler\.attention\.out_proj\.weight", _uniform(math.sqrt(3), width)),
            (r"resampler\.attention\.[qkv]_proj\.bias", _uniform(1.0, width)),  # fairseq leaves torch's
            (r"resampler\.attention\.out_proj\.bias", _constant(0.0)),
        ]
    return [
        (r"resampler\.(latents|frame_embedding)", _normal(1.0)),
        (r"resampler\.layers\.\d+\.attention\.to_q\.weight", _uniform(resampler.query_key_gain)),
        (r"resampler\.layers\.\d+\.attention\.to_kv\.weight", _uniform_kv(resampler.query_key_gain)),
        (r"resampler\.projection\.weight", _normal(width**-0.5)),
        (r"resampler\..*\.weight", _uniform(1.0)),
    ]


def _constant(value: float) -> Initializer:
    return lambda tensor, _: tensor.fill_(value)


def _normal(std: float) -> Initializer:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def _uniform(gain: float, fan_in: int | None = None) -> Initializer:
    """U(±gain / √fan_in), torch's default for linear layers; a bias needs its weight's `fan_in`."""

    def rule(tensor: Tensor, generator: torch.Generator) -> Tensor:
        bound = gain / math.sqrt(fan_in or tensor.shape[-1])
        return tensor.uniform_(-bound, bound, generator=generator)

    return rule


def _uniform_kv(key_gain: float) -> Initializer:
    """The default for a fused [keys; values] projection, the keys times `key_gain`."""

    def rule(tensor: Tensor, generator: torch.Generator) -> Tensor:
        _uniform(1.0)(tensor, generator)
        tensor[: tensor.shape[0] // 2] *= key_gain
        return tensor

    return rule


def _magneto_qkv(decoder: DecoderConfig, value_gain: float) -> Initializer:
    """The default for megatron-core's fused rows (per group its query heads, a key head, a value head)."""

    def rule(tensor: Tensor, generator: torch.Generator) -> Tensor:
        _uniform(1.0, decoder.width)(tensor, generator)
        num_groups = decoder.num_query_groups or decoder.num_heads
        tensor.unflatten(0, (num_groups, -1, decoder.head_size))[:, -1] *= value_gain
        return tensor

    return rule


def _real_rows(num_rows: int, rule: Initializer) -> Initializer:
    """Apply `rule` to the rows of existing ids and leave padding at zero, so that it doesn't depend on the padding."""

    def padded(tensor: Tensor, generator: torch.Generator) -> Tensor:
        real = rule(tensor.new_empty(num_rows, *tensor.shape[1:]), generator)
        tensor.zero_()[:num_rows] = real
        return tensor

    return padded
