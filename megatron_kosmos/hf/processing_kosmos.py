"""Prompts and pictures to the inputs of `KosmosForConditionalGeneration`, in the format of training.

Exported folders carry this file: it imports nothing but transformers.
A picture is `<image>`, L slots that hold the padding id, `</image>` (arXiv 2302.14045, section 2.1).
"""

import re
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class KosmosImageProcessor(CLIPImageProcessorPil):
    """CLIP's preprocessing by Pillow, whatever else is installed: torchvision's resizing gives other pixels."""


class KosmosProcessor(ProcessorMixin):
    """Tokenizer and image processor in one.

    `num_image_tokens` is L, the slots of a picture; it must be the model's `config.num_image_tokens`.
    """

    def __init__(
        self,
        image_processor: KosmosImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 64,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        padding: bool = True,
        add_eos_token: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Return input_ids, attention_mask and image_embeds_position_mask [B, T], and pixel_values [I, 3, S, S].

        text: one prompt, or a list. images: for one prompt an image or a list of them; for a list of prompts a list
        with an image, a list of images or None for each. `<image>` in a prompt says where the next image goes, spaces
        around it do not count; without it the images stand before the text. padding: fill shorter rows up on the
        tokenizer's `padding_side`; without it rows of several lengths make lists and no tensors.
        add_eos_token: end each row with `</s>`, as training documents do. Images are flattened in row order.

        Raises ValueError when images and prompts, or images and places, do not match.
        """
        if text is None:
            raise ValueError('text is needed; give "" to begin with the image alone')
        prompts = [text] if isinstance(text, str) else list(text)
        images_of_rows = _images_of_rows(images, prompts, is_single=isinstance(text, str))
        suffix = [self.tokenizer.eos_token_id] if add_eos_token else []
        rows, slots = [], []
        for row, (prompt, row_images) in enumerate(zip(prompts, images_of_rows, strict=True)):
            try:
                ids, is_slot = self._lay_out(prompt, len(row_images))
            except ValueError as error:
                raise ValueError(f"prompt {row}: {error}") from error
            rows.append(ids + suffix)
            slots.append(is_slot + [0] * len(suffix))
        inputs = self._pad(rows, slots, max(map(len, rows), default=0) if padding else 0)
        flat = [image for row_images in images_of_rows for image in row_images]
        if flat:
            inputs["pixel_values"] = self.image_processor(images=flat, return_tensors=return_tensors)["pixel_values"]
        return BatchFeature(inputs, tensor_type=return_tensors)

    def num_tokens(self, prompt: str, num_images: int) -> int:
        """Return the tokens of a prompt with so many pictures. Raises ValueError when it has not as many places."""
        ids, _ = self._lay_out(prompt, num_images)
        return len(ids)

    def _lay_out(self, prompt: str, num_images: int) -> tuple[list[int], list[int]]:
        """Return a row's ids and, for each, 1 if it is an image's slot."""
        tokenizer = self.tokenizer
        # Spaces around `<image>` separate words in the prompt; in training there are none.
        texts = re.split(f" *{re.escape(tokenizer.image_token)} *", prompt)
        if len(texts) == 1:
            texts = [""] * num_images + texts
        if len(texts) - 1 != num_images:
            raise ValueError(
                f"{len(texts) - 1} {tokenizer.image_token} for {num_images} image(s) in {prompt!r}; "
                f"write one for each image, or none to put the images before the text"
            )
        picture = [tokenizer.image_token_id, *[tokenizer.pad_token_id] * self.num_image_tokens]
        picture.append(tokenizer.end_of_image_token_id)
        ids, is_slot = [tokenizer.bos_token_id], [0]
        for place, part in enumerate(texts):
            if place > 0:
                ids += picture
                is_slot += [0, *[1] * self.num_image_tokens, 0]
            pieces = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            ids += pieces
            is_slot += [0] * len(pieces)
        return ids, is_slot

    def _pad(self, rows: list[list[int]], slots: list[list[int]], length: int) -> dict[str, Any]:
        on_the_left = self.tokenizer.padding_side == "left"

        def pad(values: list[int], filler: int) -> list[int]:
            filling = [filler] * (length - len(values))
            return filling + values if on_the_left else values + filling

        return {
            "input_ids": [pad(ids, self.tokenizer.pad_token_id) for ids in rows],
            "attention_mask": [pad([1] * len(ids), 0) for ids in rows],
            "image_embeds_position_mask": [pad(is_slot, 0) for is_slot in slots],
        }

    def batch_decode(self, *args: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Return the texts of rows of ids, without special tokens unless asked for; `</line>` becomes a newline."""
        return self.tokenizer.batch_decode(*args, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", "image_embeds_position_mask", "pixel_values"]


def _images_of_rows(images: Any, prompts: list[str], is_single: bool) -> list[list[Any]]:
    if images is None:
        return [[] for _ in prompts]
    if is_single:
        return [list(images) if isinstance(images, (list, tuple)) else [images]]
    if not isinstance(images, (list, tuple)) or len(images) != len(prompts):
        given = f"{len(images)} entries" if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(
            f"images must be a list with one entry (an image, a list of images or None) for each of the "
            f"{len(prompts)} prompts, not {given}"
        )
    return [[] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]


__all__ = ["KosmosImageProcessor", "KosmosProcessor"]
