"""KOSMOS for transformers: CLIP vision tower, resampler and decoder, with generation.

Exported folders carry this file: it imports nothing but torch and transformers.

Shape letters: B rows, T tokens of this call, C tokens in the cache and of this call, D decoder width, V vocabulary,
I images of all rows, S image side, L latents (slots) of an image.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from .configuration_kosmos import KosmosConfig
from .decoder_kosmos import CACHE_NAME, KosmosAttention, KosmosDecoderLayer, KosmosTextModel
from .resampler_kosmos import RESAMPLERS, KosmosCrossAttention, KosmosPerceiver


class KosmosPreTrainedModel(PreTrainedModel):
    """What transformers must know of every KOSMOS class."""

    config_class = KosmosConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["KosmosDecoderLayer", "PerceiverLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": KosmosDecoderLayer, "attentions": KosmosAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill fresh weights from N(0, initializer_range); the vision tower has its own rule."""
        super()._init_weights(module)
        if isinstance(module, (KosmosPerceiver, KosmosCrossAttention)):
            init.normal_(module.latents, std=self.config.initializer_range)
        if isinstance(module, KosmosPerceiver):
            init.normal_(module.frame_embedding, std=self.config.initializer_range)


class KosmosForConditionalGeneration(KosmosPreTrainedModel, GenerationMixin):
    """A multimodal causal language model: text with images spliced in, text out."""

    main_input_name = "input_ids"
    _tied_weights_keys = {  # noqa: RUF012
        "text_model.lm_head.weight": "text_model.model.embed_tokens.weight"
    }

    def __init__(self, config: KosmosConfig):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.resampler = RESAMPLERS[config.resampler](config)
        self.text_model = KosmosTextModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.text_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.text_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output projection."""
        return self.text_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output projection."""
        self.text_model.lm_head = new_embeddings

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings [I, L, D] that stand for images [I, 3, S, S]."""
        patches = self.vision_tower(pixel_values.to(self.resampler.latents.dtype)).last_hidden_state
        if self.config.vision_features == "normalized":
            patches = nn.functional.normalize(self.vision_tower.post_layernorm(patches), dim=-1)
        return self.resampler(patches)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # noqa: PLR0913, PLR0917 - transformers' signature
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_embeds_position_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V], and the loss when labels are given.

        input_ids: [B, T] int64; an image's slots hold any id. pixel_values: [I, 3, S, S], the images of all rows in
        order. image_embeds_position_mask: [B, T], true on the slots, L an image. attention_mask: [B, C] of 1 and 0,
        0 on padding; positions count from each row's first real token. image_embeds: [I, L, D] in place of
        pixel_values. cache: keys and values so far; past_key_values is its older name. labels: [B, T], not shifted,
        -100 where no loss counts.

        Raises ValueError when slots and images do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.text_model.model.embed_tokens(input_ids)
        if pixel_values is not None and image_embeds is None:
            image_embeds = self.get_image_features(pixel_values)
        inputs_embeds = self._splice(inputs_embeds, image_embeds, image_embeds_position_mask)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _count_positions(inputs_embeds, attention_mask, cache)
        hidden_states = self.text_model.model(
            inputs_embeds, attention_mask, position_ids.expand(inputs_embeds.shape[:2]), cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.text_model.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

    def _splice(self, inputs_embeds: Tensor, image_embeds: Tensor | None, slots: Tensor | None) -> Tensor:
        """Put image embeddings [I, L, D] where slots [B, T] is true, in row order."""
        if slots is None:
            if image_embeds is not None:
                raise ValueError("images were given without image_embeds_position_mask, which says where they go")
            return inputs_embeds
        if slots.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"image_embeds_position_mask has shape {list(slots.shape)}, the tokens {list(inputs_embeds.shape[:2])}"
            )
        slots = slots.to(device=inputs_embeds.device, dtype=torch.bool)
        slots_per_row = slots.sum(dim=1).tolist()
        num_images = 0 if image_embeds is None else len(image_embeds)
        num_latents = self.config.num_image_tokens
        if sum(slots_per_row) != num_images * num_latents or any(count % num_latents for count in slots_per_row):
            raise ValueError(
                f"{num_images} image(s) fill {num_images} x {num_latents} slots, but image_embeds_position_mask marks "
                f"{slots_per_row} in its rows; every image needs {num_latents} slots in one row"
            )
        if image_embeds is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(slots[..., None], image_embeds.to(inputs_embeds))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Give images to the first step only; without a cache every step is a first one."""
        slots = kwargs.pop("image_embeds_position_mask", None)
        image_embeds = kwargs.pop("image_embeds", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        cache = kwargs.get(CACHE_NAME)
        nothing_seen = is_first_iteration or cache is None or cache.get_seq_length() == 0
        if slots is not None and (nothing_seen or not kwargs.get("use_cache", True)):
            num_new = input_ids.shape[1] - slots.shape[1]
            if num_new < 0:
                raise ValueError("prefill_chunk_size cuts the prompt, and with it images; leave it out")
            inputs["image_embeds_position_mask"] = nn.functional.pad(slots, (0, num_new))
            inputs["image_embeds"] = image_embeds
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Encode the images once, and repeat each row's images for its beams.

        The stock rule would repeat image by image, which mixes the images of a row that has several.
        """
        pixel_values, image_embeds = kwargs.pop("pixel_values", None), kwargs.pop("image_embeds", None)
        slots = kwargs.get("image_embeds_position_mask")
        if pixel_values is not None and image_embeds is None:
            image_embeds = self.get_image_features(pixel_values.to(self.device))
        if image_embeds is not None and slots is not None:
            images_per_row = (slots.sum(dim=1) // self.config.num_image_tokens).tolist()
            if sum(images_per_row) == len(image_embeds):  # otherwise `_splice` explains what is wrong
                rows = image_embeds.split(images_per_row)
                image_embeds = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if image_embeds is not None:
            kwargs["image_embeds"] = image_embeds
        return input_ids, kwargs


def _count_positions(inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Return positions [B, T], or [1, T] without padding, counted from each row's first real token."""
    num_tokens = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -num_tokens:]
    num_cached = 0 if cache is None else cache.get_seq_length()
    return torch.arange(num_cached, num_cached + num_tokens, device=inputs_embeds.device)[None]


__all__ = ["KosmosForConditionalGeneration", "KosmosPreTrainedModel"]
