"""What the network is: decoder, vision tower, resampler. Sizes follow arXiv 2302.14045, section 3.2."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class DecoderConfig(StrictModel):
    """A causal Magneto decoder (sub-LN, arXiv 2210.06423)."""

    num_layers: PositiveInt
    width: PositiveInt
    """D, the size of the residual stream."""
    ffn_width: PositiveInt
    num_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Heads of keys and values; 1 is multi-query, null gives every query head its own."""
    vocab_size: PositiveInt
    """Ids that exist. Rows are padded to `vocab_multiple`; the padding never reaches loss, metrics or export."""
    vocab_multiple: PositiveInt = 1024
    """128 x 8: one padded shape for every tensor-parallel size up to 8, so that checkpoints fit any of them."""
    max_sequence_length: PositiveInt
    xpos: bool = True
    """Rotate queries and keys by position, with xPos's decay (arXiv 2212.10554)."""
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    """What is added to the input: Kosmos-X has a learned embedding of the position besides xPos, KOSMOS-2 sinusoids."""
    scale_embeddings: bool = False
    """Multiply the input by sqrt(width) after the images are spliced in, before positions are added (KOSMOS-2)."""
    query_key_norm: bool = False
    """Normalize each head's queries and keys over the head (arXiv 2302.05442, section 2), before xPos."""
    tie_embeddings: bool = False
    """Use the input embedding as the output projection."""
    dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-5
    embedding_std: PositiveFloat | None = None
    """Standard deviation of the initial embeddings; null is width ** -0.5."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output projection."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_size(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.num_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.num_query_groups is not None and self.num_heads % self.num_query_groups:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_query_groups={self.num_query_groups}"
            )
        if self.positions == "sinusoidal" and (self.width % 2 or self.width < 4):
            raise ValueError(
                f"sinusoidal positions are halves of sines and cosines: width={self.width} must be even and above 2"
            )
        if self.xpos and self.head_size % 2:
            raise ValueError(f"xpos rotates pairs: width/num_heads={self.head_size} must be even")
        return self


class VisionConfig(StrictModel):
    """A CLIP vision transformer, as `transformers.CLIPVisionModel` has it."""

    width: PositiveInt
    """E, the size of a patch feature."""
    ffn_width: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    image_size: PositiveInt
    """S, the side of the square input in pixels."""
    patch_size: PositiveInt
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's weights want quick_gelu, laion's gelu."""
    features: Literal["hidden", "normalized"] = "hidden"
    """What the resampler reads of every patch and the class token: the last layer's output, or that after the
    post-LayerNorm and divided by its L2 norm (KOSMOS-2)."""
    pretrained: Path | None = None
    """Folder of a CLIP model of `transformers` or open_clip to start from; null starts from random weights."""
    position_embedding_std: PositiveFloat = 0.02
    """Standard deviation of initial position embeddings when `pretrained` is null (decision 10)."""

    @property
    def num_patches(self) -> int:
        """P, features of an image, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        return self


class PerceiverConfig(StrictModel):
    """The perceiver resampler of Flamingo (arXiv 2204.14198, section 3.1.1) and the projection to decoder width."""

    kind: Literal["perceiver"]
    depth: PositiveInt = 2
    num_latents: PositiveInt = 64
    """L, embeddings that stand for an image in the sequence."""
    num_heads: PositiveInt = 8
    head_size: PositiveInt = 64
    ffn_multiplier: PositiveInt = 4
    query_key_gain: PositiveFloat = 1.0
    """Factor on the initial query and key weights (decision 10)."""


class CrossAttentionConfig(StrictModel):
    """KOSMOS-2's resampler (transformers' Kosmos2ImageToTextProjection): features projected to decoder width, then one
    attention from the latents to features and latents."""

    kind: Literal["cross_attention"]
    num_latents: PositiveInt = 64
    """L, embeddings that stand for an image in the sequence."""
    num_heads: PositiveInt = 32
    """KOSMOS-2 takes the decoder's."""
    attention_dropout: Probability = 0.1


ResamplerConfig = Annotated[PerceiverConfig | CrossAttentionConfig, Field(discriminator="kind")]
"""How an image's features become the L embeddings in the sequence."""


class ModelConfig(StrictModel):
    """The whole network."""

    decoder: DecoderConfig
    vision: VisionConfig
    resampler: ResamplerConfig

    @model_validator(mode="after")
    def _resampler_heads_divide(self) -> Self:
        resampler, width = self.resampler, self.decoder.width
        if isinstance(resampler, CrossAttentionConfig) and width % resampler.num_heads:
            raise ValueError(f"decoder.width={width} is not a multiple of resampler.num_heads={resampler.num_heads}")
        return self

    @model_validator(mode="after")
    def _an_image_fits(self) -> Self:
        needed = self.resampler.num_latents + 4
        if self.decoder.max_sequence_length < needed:
            raise ValueError(
                f"decoder.max_sequence_length={self.decoder.max_sequence_length} holds no image: "
                f"resampler.num_latents + 4 = {needed} tokens are the least"
            )
        return self
