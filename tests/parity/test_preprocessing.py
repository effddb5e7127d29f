"""Pictures become the pixels of transformers' CLIP processor; JPEGs that are shrunk nearly so."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.prompt import IMAGE_STD
from tests.parity.fidelity import Record
from tests.parity.ours import FP32

pytestmark = pytest.mark.parity

SIDE = 224
SIZES = [(224, 224), (100, 80), (37, 300)]
SHRUNK = [(600, 440), (225, 1000)]
ORACLE = "transformers `CLIPImageProcessorPil`"


def smooth(width: int, height: int) -> Image.Image:
    """Return a picture with waves and a little noise, as photographs have."""
    y, x = np.mgrid[0:height, 0:width] / 100
    channels = [np.sin(x * k) * np.cos(y + k) * 100 + 128 for k in (1, 2, 3)]
    noise = np.random.default_rng(width).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(channels, axis=-1) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def expected_pixels(data: bytes) -> Tensor:
    pixels: Tensor = CLIPImageProcessorPil()(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    return pixels


@pytest.mark.parametrize(
    "file_format, width, height",
    [*(("PNG", *size) for size in [*SIZES, *SHRUNK]), *(("JPEG", *size) for size in SIZES)],
)
def test_pixels_are_those_of_clip(fidelity: Record, file_format: str, width: int, height: int) -> None:
    """Of lossless pictures always, of JPEGs that are not shrunk (decision 16)."""
    data = encoded(smooth(width, height), file_format)
    fidelity.of(ORACLE, FP32).values("pixels", load_image(data, SIDE), expected_pixels(data), 1e-6)


def test_decoded_pictures_are_left_as_they_are(fidelity: Record) -> None:
    data = encoded(smooth(1600, 1200), "JPEG")
    pixels = load_image(Image.open(io.BytesIO(data)), SIDE)
    fidelity.of(ORACLE, FP32).values("pixels", pixels, expected_pixels(data), 1e-6)


@pytest.mark.parametrize(
    "size, way, bound",
    [*((size, "quickly", 0.02) for size in [*SHRUNK, (640, 481)]), ((1600, 1200), "at a half", 0.1)],
    ids=str,
)
def test_shrunk_jpegs_are_close(fidelity: Record, size: tuple[int, int], way: str, bound: float) -> None:
    """They are resized by PyTorch, from four times the model's side on decoded small as well."""
    data = encoded(smooth(*size), "JPEG")
    actual, expected = load_image(data, SIDE), expected_pixels(data)
    fidelity.of(f"{ORACLE}, JPEG of {size[0]} x {size[1]} {way}", FP32).values("pixels", actual, expected, bound)
    levels = (actual - expected) * torch.tensor(IMAGE_STD)[:, None, None] * 255
    assert 0 < levels.square().mean() < 255**2 / 10**4.5, "45 dB"
