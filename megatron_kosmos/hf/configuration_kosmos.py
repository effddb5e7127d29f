"""The sizes and switches of a KOSMOS model as a Hugging Face configuration.

Exported folders carry this file: it imports nothing but transformers.
"""

from typing import Any

from transformers import CLIPVisionConfig
from transformers.configuration_utils import PreTrainedConfig

SWITCHES = {
    "positions": ("none", "learned", "sinusoidal"),
    "vision_features": ("hidden", "normalized"),
    "resampler": ("perceiver", "cross_attention"),
}


class KosmosConfig(PreTrainedConfig):
    """Configuration of `KosmosForConditionalGeneration` (arXiv 2302.14045, section 3.2; the defaults are its sizes).

    Raises ValueError when the heads do not divide each other or the width, or a switch has no such position.
    """

    model_type = "megatron_kosmos"
    # Read by every transformers 5; the newer `sub_configs_defaults` would also make the object, but changed its form.
    sub_configs = {"vision_config": CLIPVisionConfig}  # noqa: RUF012 - transformers wants a plain dict
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 64007
    hidden_size: int = 2048
    """D, the size of the residual stream."""
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    """Heads of keys and values: `num_attention_heads` gives every query head its own, 1 is multi-query."""
    max_position_embeddings: int = 2048
    """T; xPos is centred at half of it, and learned positions end with it."""
    xpos: bool = True
    """Rotate queries and keys by position, with decay (arXiv 2212.10554)."""
    positions: str = "none"
    """What is added to the input: "none", a "learned" embedding of the position, or "sinusoidal" ones (KOSMOS-2)."""
    scale_embeddings: bool = False
    """Multiply the input, images included, by sqrt(hidden_size) before positions are added (KOSMOS-2)."""
    query_key_norm: bool = False
    """Normalize each head's queries and keys, before xPos (arXiv 2302.05442, section 2)."""
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of fresh weights; an exported folder brings trained ones."""
    vision_config: Any = None
    """A `CLIPVisionConfig`, or its values; None takes its defaults."""
    vision_features: str = "hidden"
    """What the resampler reads of every patch: the last layer's "hidden" state, or that "normalized" by the
    post-LayerNorm and its L2 norm (KOSMOS-2)."""
    resampler: str = "perceiver"
    """Flamingo's "perceiver", or KOSMOS-2's "cross_attention"."""
    resampler_num_heads: int = 8
    resampler_depth: int = 2
    """Layers of a perceiver, like the next two sizes; a cross-attention is one, of the decoder's width."""
    resampler_head_size: int = 64
    resampler_ffn_multiplier: int = 4
    resampler_attention_dropout: float | int = 0.1
    """Dropout of a cross-attention's weights, in training."""
    num_image_tokens: int = 64
    """L, the embeddings (slots) that stand for an image in the sequence."""
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    image_token_id: int | None = 4
    """Id of the marker before an image's slots."""
    end_of_image_token_id: int | None = 5
    """Id of the marker after an image's slots."""

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)
        for switch, legal in SWITCHES.items():
            if getattr(self, switch) not in legal:
                raise ValueError(f"{switch}={getattr(self, switch)!r} is none of {', '.join(legal)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.resampler == "cross_attention" and self.hidden_size % self.resampler_num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of resampler_num_heads={self.resampler_num_heads}"
            )
        if self.xpos and self.head_dim % 2:
            raise ValueError(f"xpos rotates pairs: hidden_size / num_attention_heads = {self.head_dim} must be even")

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


__all__ = ["KosmosConfig"]
