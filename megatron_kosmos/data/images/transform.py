"""From a picture to the tensor that the vision tower wants: CLIP's resize, crop and normalization.

Shape letters: S image side in pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megatron_kosmos.data.images.augmentation import View
from megatron_kosmos.data.images.decoding import decode, open_image
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

LARGE = 2
"""JPEGs are never decoded to less than this many times S."""
LOSSY = ("JPEG", "WEBP")
"""Formats that have mostly lost more than `resize_quickly` adds (WebP may be lossless)."""


def load_image(
    source: bytes | Image.Image, image_size: int, draw_view: Callable[[int, int], View] | None = None
) -> Tensor:
    """Return [3, S, S] float32 of a picture: short side to S (bicubic), centre crop, normalization. Raises DataError.

    Equal to transformers' CLIPImageProcessorPil for pictures that are decoded already, in lossless formats or smaller
    than S. Encoded JPEG and WebP, most of whose time is resizing, are within a level or two of 255 (65 dB), and JPEGs
    of 4 S and more, which are decoded at a half or less, within what photographs have in their finest detail (50 dB;
    decision 16, and docs/pictures.md has the measurements).
    `draw_view` gives for width and height the part of the picture to take instead, which is stretched to S x S.
    """
    opened = open_image(source) if isinstance(source, bytes) else source
    view = None if draw_view is None else draw_view(*opened.size)
    full_size = opened.size
    width, height = full_size if view is None else (view.width, view.height)
    short = min(width, height)
    if isinstance(source, bytes) and opened.format in LOSSY and short >= image_size:
        image, resize = decode(opened, LARGE * image_size / short * min(full_size)), resize_quickly
    else:
        image, resize = decode(opened), resize_exactly
    if view is None:
        pixels = resize(image, int(image_size * width / short), int(image_size * height / short))
    else:
        box = view.box(image.width / full_size[0], image.height / full_size[1])  # each side was rounded for itself
        pixels = resize(image.crop(box), image_size, image_size)
        pixels = pixels[:, ::-1] if view.is_flipped else pixels
    return normalize(crop_centre(pixels, image_size))


def resize_exactly(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Return [height, width, 3], the pixels of an RGB picture after Pillow's bicubic resizing."""
    # Not resize(box=…): it computes less, but Pillow then orders its two passes otherwise and the pixels differ.
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def resize_quickly(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Return what `resize_exactly` does within a level or two, in a fifth of the time.

    PyTorch's kernel is Pillow's algorithm in vector instructions, with weights of 16 instead of 22 bits.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def crop_centre(pixels: NDArray[np.uint8], image_size: int) -> NDArray[np.uint8]:
    """Return the middle [S, S, 3] of pixels [height, width, 3]."""
    top, left = ((side - image_size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def normalize(pixels: NDArray[np.uint8]) -> Tensor:
    """Return pixels [height, width, 3] as [3, height, width] float32 with CLIP's mean and deviation taken out."""
    values = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32, order="C"))
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return values.div_(255.0).sub_(mean).div_(std)
