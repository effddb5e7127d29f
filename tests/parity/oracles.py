"""The code that the model is compared with, torchscale and flamingo-pytorch, and how its weights are named here.

Both are installed without their dependencies. What torchscale imports and this decoder never calls (stochastic depth,
fairscale's wrappers) is replaced by functions that fail when they are called.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_kosmos.config import DecoderConfig, PerceiverConfig


def _stand_in(module_name: str, *function_names: str) -> None:
    def never_called(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{module_name} stands in for a dependency that parity does not need")

    module = ModuleType(module_name)
    for name in function_names:
        setattr(module, name, never_called)
    sys.modules.setdefault(module_name, module)


_stand_in("timm")
_stand_in("timm.models")
_stand_in("timm.models.layers", "drop_path")
_stand_in("fairscale")
_stand_in("fairscale.nn", "checkpoint_wrapper", "wrap")

import torchscale.component.multihead_attention as torchscale_attention  # noqa: E402
from flamingo_pytorch import PerceiverResampler as FlamingoResampler  # noqa: E402
from torchscale.architecture.config import DecoderConfig as TorchscaleConfig  # noqa: E402
from torchscale.architecture.decoder import Decoder as TorchscaleDecoder  # noqa: E402
from torchscale.component.embedding import PositionalEmbedding  # noqa: E402
from torchscale.component.feedforward_network import FeedForwardNetwork  # noqa: E402
from torchscale.component.xpos_relative_position import XPOS  # noqa: E402

FIRST_POSITION = 2
"""Row of torchscale's position embedding that the first token takes."""


def torchscale_decoder(decoder: DecoderConfig, seed: int) -> nn.Module:
    """Return torchscale's decoder of the same sizes in fp64, no parameter of which is at a trivial value."""
    width = decoder.width
    config = TorchscaleConfig(
        vocab_size=decoder.vocab_size,
        decoder_layers=decoder.num_layers,
        decoder_embed_dim=width,
        decoder_ffn_embed_dim=decoder.ffn_width,
        decoder_attention_heads=decoder.num_heads,
        layernorm_eps=decoder.layer_norm_epsilon,
        share_decoder_input_output_embed=decoder.tie_embeddings,
        dropout=decoder.dropout,
        attention_dropout=decoder.attention_dropout,
        no_scale_embedding=not decoder.scale_embeddings,
        xpos_rel_pos=decoder.xpos,
        subln=True,
    )
    positions = PositionalEmbedding(decoder.max_sequence_length + FIRST_POSITION, width)
    oracle = TorchscaleDecoder(
        config,
        embed_tokens=nn.Embedding(decoder.vocab_size, width),
        embed_positions=positions if decoder.positions == "learned" else None,
    )
    return randomized(oracle.double().eval(), seed)


def flamingo_resampler(resampler: PerceiverConfig, width: int, seed: int) -> nn.Module:
    """Return flamingo-pytorch's resampler of the same sizes in fp64, no parameter of which is at a trivial value."""
    oracle = FlamingoResampler(
        dim=width,
        depth=resampler.depth,
        dim_head=resampler.head_size,
        heads=resampler.num_heads,
        num_latents=resampler.num_latents,
        num_media_embeds=4,
        ff_mult=resampler.ffn_multiplier,
    )
    return randomized(oracle.double().eval(), seed)


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew from `seed`: what begins at 1 (norms) around 1, other vectors around 0, matrices with
    the usual spread. All are fp32 numbers, so that one set of weights serves every precision.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_((parameter == 1.0).all() + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return module


@contextmanager
def torchscale_in_fp64(oracle: nn.Module) -> Iterator[None]:
    """Let torchscale's softmax and GELU, which it computes in fp32 in every precision, run in the dtype of their input.

    Unchanged, its rounding hides what differs below 1e-7. The decoder is of no use afterwards.
    """

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return F.softmax(scores, dim)

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)  # The activation is handed a rounded copy of it.

    kept: list[Tensor] = []
    hooks: list[RemovableHandle] = []
    functional = torchscale_attention.F
    torchscale_attention.F = SimpleNamespace(softmax=softmax)
    for module in oracle.modules():
        if isinstance(module, FeedForwardNetwork):
            hooks.append(module.fc1.register_forward_hook(keep))
            module.activation_fn = lambda _rounded: F.gelu(kept.pop())
    try:
        yield
    finally:
        torchscale_attention.F = functional
        for hook in hooks:
            hook.remove()


def torchscale_tables(head_size: int, max_length: int) -> dict[str, Tensor]:
    """Return the tables [T, K / 2] that torchscale's xPos multiplies by in fp64, by the names that ours have.

    Read off from what it makes of vectors whose even columns are 1 and whose odd ones are 0.
    """
    oracle = XPOS(head_size).double()
    even = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(max_length, head_size // 2)[None]
    query, key = oracle(even)[0], oracle(even, downscale=True)[0]
    return {
        "query_cos": query[:, 0::2],
        "query_sin": query[:, 1::2],
        "key_cos": key[:, 0::2],
        "key_sin": key[:, 1::2],
    }


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's gradient after a backward pass; all must have one."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


@dataclass(frozen=True)
class DecoderNames:
    """Renames torchscale's whole tensors, weights and gradients alike, to this package's global names."""

    decoder: DecoderConfig
    padding: float
    """What the rows of ids that don't exist hold: anything in weights, zero in gradients."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the renamed tensors. Every one is used."""
        left = dict(tensors)
        renamed = {"embedding.word_embeddings.weight": self._padded(left.pop("embed_tokens.weight"))}
        if self.decoder.positions == "learned":
            rows = left.pop("embed_positions.weight")[FIRST_POSITION:]
            renamed["embedding.position_embeddings.weight"] = rows
        output = left.pop("output_projection.weight", None)
        if not self.decoder.tie_embeddings:
            assert output is not None
            renamed["output_layer.weight"] = self._padded(output)
        for kind in ("weight", "bias"):
            renamed[f"decoder.final_layernorm.{kind}"] = left.pop(f"layer_norm.{kind}")
            for layer in range(self.decoder.num_layers):
                renamed |= self._layer(left, layer, kind)
        buffers = [name for name in left if name.endswith("xpos.scale")]
        assert len(left) == len(buffers), f"unused: {left.keys()}"
        return renamed

    def _layer(self, left: dict[str, Tensor], layer: int, kind: str) -> dict[str, Tensor]:
        theirs, ours = f"layers.{layer}.", f"decoder.layers.{layer}."
        heads = [
            left.pop(f"{theirs}self_attn.{projection}_proj.{kind}").unflatten(0, (self.decoder.num_heads, -1))
            for projection in "qkv"
        ]
        names = {
            "self_attn_layer_norm": "input_layernorm",
            "final_layer_norm": "pre_mlp_layernorm",
            "self_attn.inner_attn_ln": "self_attention.linear_proj.norm",
            "self_attn.out_proj": "self_attention.linear_proj",
            "ffn.fc1": "mlp.linear_fc1",
            "ffn.ffn_layernorm": "mlp.linear_fc2.norm",
            "ffn.fc2": "mlp.linear_fc2",
        }
        renamed = {f"{ours}{our}.{kind}": left.pop(f"{theirs}{their}.{kind}") for their, our in names.items()}
        # megatron-core's rows go head by head: its query, its key, its value.
        renamed[f"{ours}self_attention.linear_qkv.{kind}"] = torch.stack(heads, dim=1).flatten(0, 2)
        return renamed

    def _padded(self, rows: Tensor) -> Tensor:
        num_padding = self.decoder.padded_vocab_size - rows.shape[0]
        return torch.cat((rows, rows.new_full((num_padding, rows.shape[1]), self.padding)))


def resampler_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename flamingo-pytorch's tensors; a picture is a single frame, so one row of its frame embeddings is used."""
    parts = {
        "0.norm_media": "attention.media_norm",
        "0.norm_latents": "attention.latents_norm",
        "0.to_q": "attention.to_q",
        "0.to_kv": "attention.to_kv",
        "0.to_out": "attention.to_out",
        "1.0": "ffn.norm",
        "1.1": "ffn.fc1",
        "1.3": "ffn.fc2",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if name == "media_pos_emb":
            renamed["frame_embedding"] = tensor[0, 0]
        elif name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            part, kind = part.rsplit(".", 1)
            renamed[f"layers.{layer}.{parts[part]}.{kind}"] = tensor
        else:
            renamed[name] = tensor
    return renamed
