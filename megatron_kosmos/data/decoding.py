"""Decoding a picture's bytes with Pillow: checked first, shrunk while decoding where the format can.

Shape letters: S image side in pixels.
"""

import io

from PIL import Image, UnidentifiedImageError

from megatron_kosmos.data.errors import DataError

MAX_PIXELS = 89_478_485
"""Larger pictures (268 MB decoded; Pillow warns from there) are refused before they are decoded."""
MAX_ASPECT = 100
"""Longer strips are refused: resizing the short side to S would make the long one enormous."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that may run: well-tested ones. Pillow has many more, some of which start other programs."""
EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}


def decode_image(data: bytes, shrink_to: int | None = None) -> Image.Image:
    """Return the decoded picture in RGB; its size is that of the file.

    With `shrink_to` = S, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as its short side stays ≥ S (Pillow's
    draft mode): twice as fast, 48 dB from the full decode followed by the same resize. Raises DataError.
    """
    try:
        image = open_image(data)
        if shrink_to is not None:
            factor = shrink_to / min(image.size)
            image.draft("RGB", (-int(-image.width * factor // 1), -int(-image.height * factor // 1)))
        return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything for damaged files: SyntaxError, struct.error, OSError …
        raise DataError(f"the picture does not decode: {error or type(error).__name__}") from error


def open_image(data: bytes) -> Image.Image:
    """Return the picture with its size known and nothing decoded yet. Raises DataError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError(f"no picture in these {len(data)} bytes; formats are {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"the picture is too large: {error}") from error
    except Exception as error:
        raise DataError(f"the picture does not open: {error or type(error).__name__}") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"the picture has {image.width} x {image.height} pixels; {MAX_PIXELS} are the most")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise DataError(f"the picture is {image.width} x {image.height}, thinner than 1:{MAX_ASPECT}")
    return image


def extension(image: Image.Image) -> str:
    """Return the usual file name extension of an opened picture's format, which its own name may belie."""
    name = image.format or "bin"
    return EXTENSIONS.get(name, name.lower())
