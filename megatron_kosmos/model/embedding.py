"""The input of the decoder: token embeddings with image embeddings spliced into their slots, and positions.

Shape letters: B batch, T tokens, D decoder width, I images, L latents.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_kosmos.config import DecoderConfig
from megatron_kosmos.model.dropout import dropout

_FIRST_ROW = 2


class SplicedEmbedding(nn.Module):
    """Embeds tokens, puts images in their slots, scales both, adds positions and drops out."""

    def __init__(self, decoder: DecoderConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = math.sqrt(decoder.width) if decoder.scale_embeddings else 1.0
        self.word_embeddings = VocabParallelEmbedding(
            decoder.padded_vocab_size, decoder.width, init_method=torch.nn.init.zeros_, config=config
        )
        self.position_embeddings = _position_embeddings(decoder, config.params_dtype)

    def forward(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, images_ILD: Tensor, image_positions: Tensor
    ) -> Tensor:
        """Return [T, B, D], or this rank's share [T / tp, B, D] of it under sequence parallelism.

        `image_positions` [I, 2] has row and column of each image's first slot. `images_ILD` may hold further, blank
        images behind those; they go nowhere, but their operations run.
        """
        hidden_BTD = self.word_embeddings(input_ids_BT)
        hidden_BTD = splice(hidden_BTD, images_ILD.to(hidden_BTD.dtype), image_positions)
        return self.add_positions(hidden_BTD, position_ids_BT)

    def add_positions(self, hidden_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return what `forward` makes of tokens with their images spliced in [B, T, D]."""
        if self.scale != 1.0:
            hidden_BTD = hidden_BTD * self.scale
        if self.position_embeddings is not None:
            hidden_BTD = (hidden_BTD + self.position_embeddings(position_ids_BT)).to(hidden_BTD.dtype)
        hidden_TBD = hidden_BTD.transpose(0, 1).contiguous()
        probability = self.config.hidden_dropout
        if not self.config.sequence_parallel:
            return dropout(hidden_TBD, probability, self.training)
        hidden_TBD = scatter_to_sequence_parallel_region(hidden_TBD)
        with get_cuda_rng_tracker().fork():
            return dropout(hidden_TBD, probability, self.training)


class SinusoidalPositions(nn.Module):
    """KOSMOS-2's fixed table of positions: a row is D/2 sines, then D/2 cosines, of wavelengths 2 pi to 20,000 pi.

    As transformers' Kosmos2TextSinusoidalPositionalEmbedding has it, whose rows 0 and 1 are no positions (fairseq keeps
    row 1 for padding): the first token takes row 2. The table is fp32 in every precision.
    """

    def __init__(self, max_length: int, width: int) -> None:
        super().__init__()
        half = width // 2
        frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000) / (half - 1)))
        angle = torch.arange(_FIRST_ROW, _FIRST_ROW + max_length, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("table", torch.cat((angle.sin(), angle.cos()), dim=1), persistent=False)

    def forward(self, position_ids_BT: Tensor) -> Tensor:
        """Return the rows [B, T, D] of positions that count from 0."""
        return F.embedding(position_ids_BT, self.get_buffer("table"))


def _position_embeddings(decoder: DecoderConfig, dtype: torch.dtype) -> nn.Module | None:
    if decoder.positions == "learned":
        return nn.Embedding(decoder.max_sequence_length, decoder.width, dtype=dtype)
    if decoder.positions == "sinusoidal":
        return SinusoidalPositions(decoder.max_sequence_length, decoder.width)
    return None


def splice(hidden_BTD: Tensor, images_ILD: Tensor, image_positions: Tensor) -> Tensor:
    """Return `hidden_BTD` with the rows of the first len(image_positions) images written over their slots."""
    length, num_latents = hidden_BTD.shape[1], images_ILD.shape[1]
    first_slot = image_positions[:, 0] * length + image_positions[:, 1]
    slots = (first_slot[:, None] + torch.arange(num_latents, device=first_slot.device)).flatten()
    spliced = images_ILD[: image_positions.shape[0]].flatten(0, 1)
    return hidden_BTD.flatten(0, 1).index_copy(0, slots, spliced).view_as(hidden_BTD)
