"""From a picture to the tensor that the vision tower wants: CLIP's resize, crop and normalization.

Shape letters: S image side in pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_kosmos.data.decoding import decode_image
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD


def load_image(source: bytes | Image.Image, image_size: int) -> Tensor:
    """Return [3, S, S] float32 of an encoded or decoded picture: short side to S (bicubic), centre crop, normalization.

    Equal to transformers' CLIPImageProcessor for pictures that Pillow's draft mode does not touch. Raises DataError for
    bytes that do not decode.
    """
    image = decode_image(source, shrink_to=image_size) if isinstance(source, bytes) else source.convert("RGB")
    return normalize(resize_and_crop(image, image_size))


def resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Return the middle S x S pixels of `image` after its short side became S."""
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    # Not resize(box=…): it computes less, but Pillow then orders its two passes otherwise and the pixels differ.
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + image_size, top + image_size))


def normalize(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB picture as [3, height, width] float32 with CLIP's mean and deviation taken out."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255.0
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (pixels - mean) / std
