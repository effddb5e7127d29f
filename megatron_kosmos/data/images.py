"""From a picture to the tensor that the vision tower wants: CLIP's resize, crop and normalization.

Shape letters: S image side in pixels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_kosmos.data.decoding import decode_image
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD


def load_image(source: Path | str | bytes | Image.Image, image_size: int) -> Tensor:
    """Return [3, S, S] float32: short side to S (bicubic), centre crop, CLIP's normalization.

    Equal to transformers' CLIPImageProcessor for pictures that Pillow's draft mode does not touch. Raises DataError for
    a file that cannot be read or does not decode.
    """
    if isinstance(source, (str, Path)):
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise DataError(f"no picture at {source}: {error.strerror}") from error
        try:
            image = decode_image(data, shrink_to=image_size)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
    elif isinstance(source, bytes):
        image = decode_image(source, shrink_to=image_size)
    else:
        image = source.convert("RGB")
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
