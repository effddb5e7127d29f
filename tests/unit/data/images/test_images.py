"""Pictures become the pixels that transformers' CLIP processor makes; lossy ones nearly so."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.data.images.decoding import decode, extension, open_image
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD
from tests.unit.data.images.odd_pictures import encoded


def encode(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("width, height", [(224, 224), (100, 80), (37, 300), (640, 481), (5, 3), (225, 1000)])
@pytest.mark.parametrize("image_size", [32, 224])
def test_pixels_are_those_of_clip(picture: Callable[..., bytes], width: int, height: int, image_size: int) -> None:
    data = picture(seed=width, width=width, height=height)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    pixels = load_image(data, image_size)
    assert pixels.shape == (3, image_size, image_size)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_bytes_and_a_picture_give_the_same(picture: Callable[..., bytes]) -> None:
    data = picture()
    assert torch.equal(load_image(Image.open(io.BytesIO(data)), 16), load_image(data, 16))


def photograph(width: int, height: int) -> bytes:
    """Return a JPEG of waves and noise, at least as hard to shrink as a photograph."""
    y, x = np.mgrid[0:height, 0:width] / 40
    channels = [np.sin(x * k) * np.cos(y + k) * 90 + 128 for k in (1, 2, 3)]
    noise = np.random.default_rng(width).normal(0, 12, (height, width, 3))
    return encode(Image.fromarray(np.clip(np.stack(channels, axis=-1) + noise, 0, 255).astype(np.uint8)), "JPEG")


@pytest.mark.parametrize(
    "width, height, most",
    [(33, 40, 1), (200, 63, 1), (64, 130, 1), (200, 127, 1), (90, 91, 1), (640, 130, 9), (600, 256, 9)],
)
def test_jpegs_are_close(width: int, height: int, most: int) -> None:
    """They are resized quickly and, from four times the model's side on, decoded at a half or less."""
    data = photograph(width, height)
    actual = levels(load_image(data, 32))
    expected = levels(load_image(Image.open(io.BytesIO(data)), 32))
    difference = (actual - expected).abs().max()
    assert 0.5 < difference < most + 0.5, "levels of 255; less is Pillow's own resizing"


def levels(pixels: Tensor) -> Tensor:
    return (pixels * torch.tensor(IMAGE_STD)[:, None, None] + torch.tensor(IMAGE_MEAN)[:, None, None]) * 255


@pytest.mark.parametrize("width, height", [(200, 31), (32, 50)])
def test_what_is_not_shrunk_is_exact(width: int, height: int) -> None:
    data = photograph(width, height)
    assert torch.equal(load_image(data, 32), load_image(Image.open(io.BytesIO(data)), 32))


@pytest.mark.parametrize("short, expected", [(64, 64), (127, 127), (128, 64), (300, 75), (513, 65), (4000, 500)])
def test_jpegs_are_decoded_small_but_not_too_small(short: int, expected: int) -> None:
    data = encode(Image.new("RGB", (short * 2, short)), "JPEG")
    assert decode(open_image(data), shrink_to=64).height == expected


def test_the_extension_is_that_of_the_content(picture: Callable[..., bytes]) -> None:
    formats = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
    assert [extension(open_image(picture(file_format=name))) for name in formats] == list(formats.values())
    several = encoded(Image.new("RGB", (9, 9)), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert extension(open_image(several)) == "jpg"  # a JPEG with more behind it, as some phones write
