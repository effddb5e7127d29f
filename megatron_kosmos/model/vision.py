"""The CLIP vision tower: transformers' model, with a frozen trunk that runs without autograd.

Shape letters: I images, S image side, P patches (class token included), E vision width.
"""

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_kosmos.config import VisionConfig


class VisionTower(CLIPVisionModel):
    """CLIP's vision transformer up to its last layer's output, without pooling and post-LayerNorm.

    The first `frozen_layers` layers and the embedding under them keep their weights and build no graph.
    `post_layernorm` takes no part; it stays, untrained, so that weights can be exchanged with transformers.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(clip_config(config))
        self.frozen_layers = config.frozen_layers
        self.post_layernorm.requires_grad_(False)
        if self.frozen_layers:
            frozen = [self.embeddings, self.pre_layrnorm, *self.encoder.layers[: self.frozen_layers]]
            for module in frozen:
                module.requires_grad_(False)

    def forward(self, images_I3SS: Tensor) -> Tensor:
        """Return the patch features [I, P, E] of normalized images [I, 3, S, S]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_layers == 0):
            hidden = self.pre_layrnorm(self.embeddings(images_I3SS))
            for layer in self.encoder.layers[: self.frozen_layers]:
                hidden = layer(hidden, attention_mask=None)
        for layer in self.encoder.layers[self.frozen_layers :]:
            hidden = layer(hidden, attention_mask=None)
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
