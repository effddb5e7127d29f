"""Pictures with their captions beneath them, as TensorBoard shows them.

Shape letters: I images, S image side in pixels.
"""

from textwrap import wrap
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

CARD_WIDTH: Final = 224
FONT_SIZE: Final = 14
MARGIN: Final = 6


def to_picture(image: Tensor) -> Image.Image:
    """Undo CLIP's normalization of one image [3, S, S] of a `MultimodalBatch`."""
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    pixels = (image.detach().float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy(), mode="RGB")


def render_card(picture: Image.Image, caption: str) -> np.ndarray:
    """Return `picture`, scaled to the card's width, above its wrapped `caption`: uint8 [height, width, 3].

    The font is Pillow's own, which has no glyphs outside Latin; TensorBoard's text tab holds every caption as it is.
    """
    height = round(CARD_WIDTH * picture.height / picture.width)
    enlarges = picture.width < CARD_WIDTH
    picture = picture.resize((CARD_WIDTH, height), Image.Resampling.NEAREST if enlarges else Image.Resampling.BICUBIC)

    font = ImageFont.load_default(size=FONT_SIZE)
    characters_per_line = int((CARD_WIDTH - 2 * MARGIN) / font.getlength("n"))
    text = "\n".join(wrap(caption, characters_per_line)) or "(empty)"
    _, _, _, text_bottom = ImageDraw.Draw(picture).multiline_textbbox((MARGIN, MARGIN), text, font=font)

    card = Image.new("RGB", (CARD_WIDTH, height + int(text_bottom) + MARGIN), "white")
    card.paste(picture, (0, 0))
    ImageDraw.Draw(card).multiline_text((MARGIN, height + MARGIN), text, fill="black", font=font)
    return np.asarray(card)
