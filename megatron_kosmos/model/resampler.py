"""The perceiver resampler (Flamingo, arXiv 2204.14198, section 3.1.1): any number of features to L embeddings.

Shape letters: I images, P patches, L latents, E vision width, H heads, K head size, N = P + L,
D decoder width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_kosmos.config import PerceiverConfig


class PerceiverResampler(nn.Module):
    """Learned latents that attend to an image's features, projected to the decoder's width."""

    def __init__(self, config: PerceiverConfig, vision_width: int, decoder_width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, vision_width))
        self.frame_embedding = nn.Parameter(torch.empty(vision_width))
        """Flamingo's time embedding for the one frame that a picture has."""
        self.layers = nn.ModuleList(PerceiverLayer(config, vision_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, decoder_width, bias=False)

    def forward(self, patches_IPE: Tensor) -> Tensor:
        """Return image embeddings [I, L, D]. I ≥ 1: a text-only microbatch carries a blank image."""
        return self.projection(self.resample(patches_IPE))

    def resample(self, patches_IPE: Tensor) -> Tensor:
        """Return the resampled features [I, L, E] before the projection (flamingo-pytorch's output)."""
        media_IPE = patches_IPE + self.frame_embedding
        latents_ILE = self.latents.expand(media_IPE.shape[0], -1, -1)
        for layer in self.layers:
            latents_ILE = layer(media_IPE, latents_ILE)
        return self.norm(latents_ILE)


class PerceiverLayer(nn.Module):
    """Attention from latents to features, then a feed-forward network, each with a residual connection."""

    def __init__(self, config: PerceiverConfig, width: int) -> None:
        super().__init__()
        self.attention = PerceiverAttention(width, config.num_heads, config.head_size)
        self.ffn = FeedForward(width, width * config.ffn_multiplier)

    def forward(self, media_IPE: Tensor, latents_ILE: Tensor) -> Tensor:
        """Return the updated latents [I, L, E]."""
        latents_ILE = latents_ILE + self.attention(media_IPE, latents_ILE)
        return latents_ILE + self.ffn(latents_ILE)


class PerceiverAttention(nn.Module):
    """Cross-attention whose keys and values come from the features and the latents together."""

    def __init__(self, width: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.media_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_size, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_size, bias=False)
        self.to_out = nn.Linear(num_heads * head_size, width, bias=False)

    def forward(self, media_IPE: Tensor, latents_ILE: Tensor) -> Tensor:
        """Return what the latents read, [I, L, E]."""
        latents_ILE = self.latents_norm(latents_ILE)
        query = self.to_q(latents_ILE)
        key, value = self.to_kv(torch.cat((self.media_norm(media_IPE), latents_ILE), dim=1)).chunk(2, dim=-1)
        q_IHLK, k_IHNK, v_IHNK = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        read_IHLK = F.scaled_dot_product_attention(q_IHLK, k_IHNK, v_IHNK)
        return self.to_out(read_IHLK.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """LayerNorm, two projections without bias and a GELU between them."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width, bias=False)
        self.fc2 = nn.Linear(ffn_width, width, bias=False)

    def forward(self, latents_ILE: Tensor) -> Tensor:
        """Return the update of the latents, [I, L, E]."""
        return self.fc2(F.gelu(self.fc1(self.norm(latents_ILE))))
