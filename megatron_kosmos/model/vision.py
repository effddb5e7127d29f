"""The CLIP vision tower: transformers' model up to the features of every token.

Shape letters: I images, S image side, P patches (class token included), E vision width.
"""

import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_kosmos.config import VisionConfig


class VisionTower(CLIPVisionModel):
    """CLIP's vision transformer without pooling: its last layer's output, or with `features: normalized` that after
    the post-LayerNorm and divided by its L2 norm, of every token (KOSMOS-2, transformers' Kosmos2Model).

    Images need no gradient, so layers below the lowest trained weight build no graph. With `features: hidden`
    `post_layernorm` takes no part; it stays, untrained, so that weights can be exchanged with transformers.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(clip_config(config))
        self.normalizes_features = config.features == "normalized"
        self.post_layernorm.requires_grad_(self.normalizes_features)

    def forward(self, images_I3SS: Tensor) -> Tensor:
        """Return the patch features [I, P, E] of normalized images [I, 3, S, S]."""
        hidden = self.pre_layrnorm(self.embeddings(images_I3SS))
        for layer in self.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        if self.normalizes_features:
            hidden = F.normalize(self.post_layernorm(hidden), dim=-1)
        return hidden


def clip_config(config: VisionConfig) -> CLIPVisionConfig:
    """Translate to transformers' configuration."""
    return CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        attn_implementation="sdpa",
    )
