"""Pictures become the pixels that transformers' CLIP processor makes; those that cannot say why."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.data.decoding import MAX_PIXELS, decode_image, extension, open_image
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images import load_image, resize_and_crop


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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_colour_modes(mode: str) -> None:
    image = Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode)
    pixels = load_image(encode(image, "TIFF" if mode == "CMYK" else "PNG"), 8)
    white = load_image(Image.new("RGB", (20, 20), (255, 255, 255)), 8)
    torch.testing.assert_close(pixels, white)


def test_draft_mode_stays_close_to_the_full_decode() -> None:
    """At least 45 dB on a smooth picture, which photographs are next to noise."""
    y, x = np.mgrid[0:1200, 0:1600] / 100
    channels = [np.sin(x * k) * np.cos(y + k) * 100 + 128 for k in (1, 2, 3)]
    data = encode(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)), "JPEG")
    drafted = decode_image(data, shrink_to=224)
    assert drafted.size == (400, 300)
    small, full = (np.asarray(resize_and_crop(image, 224), float) for image in (drafted, decode_image(data)))
    assert 10 * np.log10(255**2 / np.mean((small - full) ** 2)) > 45


def test_the_extension_is_that_of_the_content(picture: Callable[..., bytes]) -> None:
    formats = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
    assert [extension(open_image(picture(file_format=name))) for name in formats] == list(formats.values())


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_truncated_pictures(picture: Callable[..., bytes], file_format: str) -> None:
    data = picture(width=60, height=60, file_format=file_format)
    for cut in (0, 10, len(data) // 2):
        with pytest.raises(DataError, match=r"does not decode|does not open|no picture in these"):
            decode_image(data[:cut])


def test_bytes_that_are_no_picture_are_refused() -> None:
    with pytest.raises(DataError, match=r"no picture in these 13 bytes"):
        load_image(b"not a picture", 8)


def test_a_picture_with_too_many_pixels_is_refused_undecoded() -> None:
    side = int(MAX_PIXELS**0.5)
    data = bytearray(encode(Image.new("1", (side, 8))))
    height_at = data.index(b"IHDR") + 8
    data[height_at : height_at + 4] = (side + 10).to_bytes(4, "big")
    import zlib

    start = data.index(b"IHDR")
    data[start + 17 : start + 21] = zlib.crc32(data[start : start + 17]).to_bytes(4, "big")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match=f"{MAX_PIXELS} are the most"):
        decode_image(bytes(data))


def test_a_strip_is_refused() -> None:
    with pytest.raises(DataError, match="is 1001 x 10, thinner than 1:100"):
        decode_image(encode(Image.new("L", (1001, 10))))
