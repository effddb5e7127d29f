"""KOSMOS-2's resampler (arXiv 2306.14824): features at the decoder's width, read once by learned latents.

The mathematics is that of transformers' Kosmos2ImageToTextProjection.

Shape letters: I images, P patches, L latents, E vision width, D decoder width, H heads, K head size, N = P + L.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_kosmos.config import CrossAttentionConfig


class CrossAttentionResampler(nn.Module):
    """Learned latents that attend once to an image's projected features and to themselves."""

    def __init__(self, config: CrossAttentionConfig, vision_width: int, decoder_width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(vision_width, decoder_width)
        self.latents = nn.Parameter(torch.empty(config.num_latents, decoder_width))
        self.attention = CrossAttention(decoder_width, config.num_heads, config.attention_dropout)

    def forward(self, patches_IPE: Tensor) -> Tensor:
        """Return image embeddings [I, L, D]. I ≥ 1: a text-only microbatch carries a blank image."""
        features_IPD = self.projection(patches_IPE)
        latents_ILD = self.latents.expand(features_IPD.shape[0], -1, -1)
        output: Tensor = self.attention(latents_ILD, torch.cat((features_IPD, latents_ILD), dim=1))
        return output


class CrossAttention(nn.Module):
    """Multi-head attention with biases, from one sequence to another."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, latents_ILD: Tensor, media_IND: Tensor) -> Tensor:
        """Return what the latents read of `media_IND`, [I, L, D]."""
        query, key, value = self.q_proj(latents_ILD), self.k_proj(media_IND), self.v_proj(media_IND)
        q_IHLK, k_IHNK, v_IHNK = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Images are shared out over the tensor ranks, so their masks must differ between ranks.
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            read_IHLK = F.scaled_dot_product_attention(q_IHLK, k_IHNK, v_IHNK, dropout_p=dropout)
        output: Tensor = self.out_proj(read_IHLK.transpose(1, 2).flatten(-2))
        return output
