"""The way of an image into KOSMOS: from patch features of any number to L embeddings of the decoder's width.

Exported folders carry this file: it imports nothing but torch and transformers.

Shape letters: I images, P patches (the class token included), E vision width, L latents, D decoder width,
N = P + L.
"""

import torch
from torch import Tensor, nn

from .configuration_kosmos import KosmosConfig


class PerceiverAttention(nn.Module):
    """Latents attend to an image's features and to themselves (arXiv 2204.14198, figure 5)."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        width, inner = config.vision_config.hidden_size, config.resampler_num_heads * config.resampler_head_size
        self.head_size = config.resampler_head_size
        self.media_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Return what latents [I, L, E] read from media [I, P, E] and latents: [I, L, E]."""
        latents = self.latents_norm(latents)
        key_value = self.to_kv(torch.cat((self.media_norm(media), latents), dim=1))
        query, key, value = (
            states.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for states in (self.to_q(latents), *key_value.chunk(2, dim=-1))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(-2))


class PerceiverFeedForward(nn.Module):
    """LayerNorm and two projections without bias around a GELU."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.resampler_ffn_multiplier * width, bias=False)
        self.fc2 = nn.Linear(config.resampler_ffn_multiplier * width, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Map [I, L, E] to [I, L, E]."""
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(latents))))


class PerceiverLayer(nn.Module):
    """Attention and feed-forward with residuals."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        self.attention = PerceiverAttention(config)
        self.ffn = PerceiverFeedForward(config)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Map latents [I, L, E] to [I, L, E]."""
        latents = latents + self.attention(media, latents)
        return latents + self.ffn(latents)


class KosmosPerceiver(nn.Module):
    """Flamingo's perceiver resampler and the projection to the decoder's width."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.empty(config.num_image_tokens, width))
        self.frame_embedding = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.resampler_depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patch features [I, P, E] to image embeddings [I, L, D]."""
        media = patches + self.frame_embedding
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(media, latents)
        return self.projection(self.norm(latents))


class CrossAttention(nn.Module):
    """Multi-head attention with biases, from one sequence to another."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        width = config.hidden_size
        self.head_size = width // config.resampler_num_heads
        self.dropout = config.resampler_attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        """Return what latents [I, L, D] read from media [I, N, D]: [I, L, D]."""
        query, key, value = (
            states.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for states in (self.q_proj(latents), self.k_proj(media), self.v_proj(media))
        )
        dropout = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


class KosmosCrossAttention(nn.Module):
    """KOSMOS-2's resampler (arXiv 2306.14824): latents attend once to an image's projected features and themselves."""

    def __init__(self, config: KosmosConfig):
        super().__init__()
        self.projection = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.latents = nn.Parameter(torch.empty(config.num_image_tokens, config.hidden_size))
        self.attention = CrossAttention(config)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patch features [I, P, E] to image embeddings [I, L, D]."""
        features = self.projection(patches)
        latents = self.latents.expand(len(patches), -1, -1)
        return self.attention(latents, torch.cat((features, latents), dim=1))


RESAMPLERS: dict[str, type[KosmosPerceiver | KosmosCrossAttention]] = {
    "perceiver": KosmosPerceiver,
    "cross_attention": KosmosCrossAttention,
}
"""By the names that `KosmosConfig.resampler` takes."""
