"""The pieces of the model in the order in which data goes through them, with the names of their parameters.

Known before anything is built: the layers of the pipeline stages are balanced by what is trained in which piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_kosmos.config import CrossAttentionConfig, DecoderConfig, ModelConfig, ResamplerConfig, VisionConfig

PieceKind = Literal[
    "vision_embedding",
    "vision_layer",
    "vision_norm",
    "resampler",
    "word_embedding",
    "decoder_layer",
    "decoder_norm",
    "output",
]


@dataclass(frozen=True)
class Piece:
    """A part of the model whose cost is counted as one."""

    kind: PieceKind
    matrices: tuple[str, ...]
    """Global names of the weights that activations are multiplied with."""
    others: tuple[str, ...] = ()
    """Biases, norms, latents and embeddings."""


def pieces(model: ModelConfig) -> Iterator[Piece]:
    """Yield every piece of the model, from the images to the vocabulary."""
    yield from _vision_pieces(model.vision)
    yield _resampler_piece(model.resampler)
    yield from _decoder_pieces(model.decoder)


def _vision_pieces(vision: VisionConfig) -> Iterator[Piece]:
    tower = "vision_tower."
    others = ("embeddings.class_embedding", "embeddings.position_embedding.weight", *_both("pre_layrnorm"))
    yield Piece("vision_embedding", (tower + "embeddings.patch_embedding.weight",), _under(tower, others))
    for number in range(vision.num_layers):
        linears = (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
        yield _layer("vision_layer", f"{tower}encoder.layers.{number}.", linears, ("layer_norm1", "layer_norm2"))
    is_used = vision.features == "normalized"
    yield Piece("vision_norm", (), _under(tower, _both("post_layernorm")) if is_used else ())


def _resampler_piece(resampler: ResamplerConfig) -> Piece:
    if isinstance(resampler, CrossAttentionConfig):
        linears = ("projection", *(f"attention.{one}_proj" for one in ("q", "k", "v", "out")))
        layer = _layer("resampler", "resampler.", linears, ())
        return Piece("resampler", layer.matrices, (*layer.others, "resampler.latents"))
    matrices, others = ["projection.weight"], ["latents", "frame_embedding", *_both("norm")]
    for number in range(resampler.depth):
        layer_name = f"layers.{number}."
        matrices += _under(layer_name, ("attention.to_q.weight", "attention.to_kv.weight", "attention.to_out.weight"))
        matrices += _under(layer_name, ("ffn.fc1.weight", "ffn.fc2.weight"))
        for norm in ("attention.media_norm", "attention.latents_norm", "ffn.norm"):
            others += _under(layer_name, _both(norm))
    return Piece("resampler", _under("resampler.", matrices), _under("resampler.", others))


def _decoder_pieces(decoder: DecoderConfig) -> Iterator[Piece]:
    words = "embedding.word_embeddings.weight"
    positions = ("embedding.position_embeddings.weight",) if decoder.positions == "learned" else ()
    yield Piece("word_embedding", (), (words, *positions))
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    norms: tuple[str, ...] = (
        "input_layernorm",
        "pre_mlp_layernorm",
        "self_attention.linear_proj.norm",
        "mlp.linear_fc2.norm",
    )
    if decoder.query_key_norm:
        norms += ("self_attention.q_layernorm", "self_attention.k_layernorm")
    for number in range(decoder.num_layers):
        yield _layer("decoder_layer", f"decoder.layers.{number}.", linears, norms)
    yield Piece("decoder_norm", (), _both("decoder.final_layernorm"))
    yield Piece("output", (words if decoder.tie_embeddings else "output_layer.weight",))


def _layer(kind: PieceKind, prefix: str, linears: tuple[str, ...], norms: tuple[str, ...]) -> Piece:
    """Return a piece of linear layers with biases, and norms."""
    biases = [f"{linear}.bias" for linear in linears]
    affine = [name for norm in norms for name in _both(norm)]
    return Piece(kind, _under(prefix, [f"{linear}.weight" for linear in linears]), _under(prefix, biases + affine))


def _both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _under(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)
