"""Decoding a picture's bytes with Pillow: checked first, shrunk while decoding where the format can.

What a picture looks like is what transformers' image processors make of it: transparency over white, the first frame
of an animation, EXIF's orientation ignored.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_kosmos.data.errors import UnusableImage

MAX_PIXELS = 89_478_485
"""Larger pictures (268 MB decoded; Pillow warns from there) are refused before they are decoded."""
MAX_ASPECT = 100
"""Longer strips are refused: resizing the short side to S would make the long one enormous."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that may run: well-tested ones. Pillow has many more, some of which start other programs."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of grey in 16 bits; PGM files of 16 bits come as "I"."""


def decode_image(data: bytes) -> Image.Image:
    """Return the decoded picture in RGB. Raises UnusableImage."""
    return decode(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """Return the picture with its size and format known and nothing decoded yet. Raises UnusableImage."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _undecodable(f"no picture in these {len(data)} bytes; formats are {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnusableImage("too_large_image", f"the picture is too large: {error}") from error
    except Exception as error:  # decoders raise nearly anything for damaged files: SyntaxError, struct.error, OSError …
        raise _undecodable(f"the picture does not open: {error or type(error).__name__}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusableImage("too_large_image", f"the picture has {width} x {height} pixels; {MAX_PIXELS} are the most")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnusableImage("too_thin_image", f"the picture is {width} x {height}, thinner than 1:{MAX_ASPECT}")
    return image


def decode(image: Image.Image, shrink_to: float | None = None) -> Image.Image:
    """Return an opened picture decoded, in RGB. Raises UnusableImage.

    With `shrink_to` a JPEG comes in 1/2, 1/4 or 1/8 of its size as long as its short side stays at least that many
    pixels (Pillow's draft mode), which saves the time of most of its inverse transforms.
    """
    try:
        if shrink_to is not None:
            factor = shrink_to / min(image.size)
            image.draft("RGB", (-int(-image.width * factor // 1), -int(-image.height * factor // 1)))
        return _to_rgb(image)
    except UnusableImage:
        raise
    except Exception as error:
        raise _undecodable(f"the picture does not decode: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM"):
        # The high byte, as Pillow does for colour of 16 bits. Its convert() would make everything above 255 white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _undecodable(f"pixels in mode {image.mode} of 32 bits, of which nothing says what is white")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _undecodable(detail: str) -> UnusableImage:
    return UnusableImage("undecodable_image", detail)


def extension(image: Image.Image) -> str:
    """Return the usual file name extension of an opened picture's format, which its own name may belie."""
    name = image.format or "bin"
    return EXTENSIONS.get(name, name.lower())
