"""Pictures as the web has them: unusual but good, and bad ones, each with why it is refused."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

RED, BLUE, WHITE = (200, 30, 40), (20, 40, 220), (255, 255, 255)
Colour = tuple[int, int, int]


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def plain(colour: Colour = RED, side: int = 20) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def good_pictures() -> dict[str, tuple[bytes, Colour]]:
    """Return encoded pictures of a single colour, by what is odd about them, and the colour that a person sees."""
    grey = np.full((20, 20), 100 * 257, dtype=np.uint16)
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([*BLUE, *RED])
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = Image.new("RGBA", (20, 20), (*BLUE, 0))
    frames: dict[str, Any] = {"save_all": True, "append_images": [plain(BLUE)], "duration": 100}
    return {
        "grey": (encoded(Image.new("L", (20, 20), 100), "PNG"), (100, 100, 100)),
        "one_bit": (encoded(Image.new("1", (20, 20), 1), "PNG"), WHITE),
        "cmyk": (encoded(Image.new("CMYK", (20, 20), (0, 0, 0, 155)), "JPEG"), (100, 100, 100)),
        "palette": (encoded(palette, "PNG"), RED),
        "palette_seen_through": (encoded(palette, "PNG", transparency=1), WHITE),
        "palette_of_alphas": (encoded(palette, "PNG", transparency=b"\xff\x00"), WHITE),
        "colour_key": (encoded(plain(), "PNG", transparency=RED), WHITE),
        "alpha": (encoded(clear, "PNG"), WHITE),
        "half_alpha": (encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 128)), "PNG"), (127, 127, 127)),
        "grey_alpha": (encoded(Image.new("LA", (20, 20), (9, 0)), "PNG"), WHITE),
        "webp_alpha": (encoded(clear, "WEBP", lossless=True), WHITE),
        "grey_16_png": (encoded(Image.fromarray(grey), "PNG"), (100, 100, 100)),
        "grey_16_tiff": (encoded(Image.fromarray(grey.astype(">u2")), "TIFF"), (100, 100, 100)),
        "grey_16_pgm": (b"P5 20 20 65535\n" + grey.astype(">u2").tobytes(), (100, 100, 100)),
        "colour_16_png": (png(20, 20, np.full((20, 60), 100 * 257, ">u2"), bits=16, colour_type=2), (100, 100, 100)),
        "animated_gif": (encoded(plain(), "GIF", **frames), RED),
        "animated_webp": (encoded(plain(), "WEBP", lossless=True, **frames), RED),
        "animated_png": (encoded(plain(), "PNG", **frames), RED),
        "garbage_behind": (encoded(plain((100, 100, 100)), "JPEG") + b"garbage" * 999, (100, 100, 100)),
        "turned_by_exif": (encoded(plain((100, 100, 100)), "JPEG", exif=turned), (100, 100, 100)),
    }


def bad_pictures() -> dict[str, tuple[bytes, str, str]]:
    """Return encoded pictures by what is wrong with them, each with the reason and a part of the message."""
    side, text = 50_000, PngImagePlugin.PngInfo()
    text.add_text("key", " " * (64 << 20), zip=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    gif, tiff = bytearray(encoded(plain(), "GIF")), bytearray(encoded(plain(), "TIFF"))
    gif[6:10] = struct.pack("<2H", side, side)
    for tag in (256, 257):  # width and height, as entries of 12 bytes: tag, type, count, value
        at = tiff.index(struct.pack("<2HI", tag, 4, 1))
        tiff[at + 8 : at + 12] = struct.pack("<I", side)
    pictures = {
        "zero_bytes": (b"", "undecodable_image", "no picture in these 0 bytes"),
        "page": (b"<html>404 not found</html>", "undecodable_image", "no picture in these 26 bytes"),
        "huge_png": (png(side, side, np.zeros((1, 9), np.uint8), bits=1), "too_large_image", "2500000000 pixels"),
        "large_png": (png(9460, 9459, np.zeros((1, 9), np.uint8), bits=1), "too_large_image", "9460 x 9459 pixels"),
        "huge_gif": (bytes(gif), "too_large_image", "2500000000 pixels"),
        "huge_tiff": (bytes(tiff), "too_large_image", "2500000000 pixels"),
        "huge_webp": (webp_canvas(16383), "too_large_image", "268402689 pixels"),
        "large_webp": (webp_canvas(12_000), "too_large_image", "12000 x 12000 pixels"),
        "strip": (encoded(Image.new("L", (1001, 10)), "PNG"), "too_thin_image", "1001 x 10, thinner than 1:100"),
        "text_bomb": (encoded(plain(), "PNG", pnginfo=text), "undecodable_image", "Decompressed data too large"),
        "float": (encoded(Image.new("F", (9, 9)), "TIFF"), "undecodable_image", "mode F of 32 bits"),
    }
    for file_format in ("PNG", "JPEG", "WEBP", "GIF"):
        data = encoded(noise, file_format)
        for part, cut in (("head", 12), ("half", len(data) // 2)):
            pictures[f"{part}_{file_format}"] = (data[:cut], "undecodable_image", "pictur")
    return pictures


def png(width: int, height: int, rows: Any, bits: int, colour_type: int = 0) -> bytes:
    """Return a PNG with this head; `rows` may be fewer."""
    head = struct.pack(">2I5B", width, height, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def webp_canvas(side: int) -> bytes:
    """Return an animated WebP of a small frame on a canvas of `side` x `side`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def three(*numbers: int) -> bytes:
        return b"".join(number.to_bytes(3, "little") for number in numbers)

    frame = three(0, 0, 15, 15, 100) + b"\0" + encoded(plain(side=16), "WEBP", lossless=True)[12:]
    head = bytes([2, 0, 0, 0]) + three(side - 1, side - 1)
    body = b"WEBP" + chunk(b"VP8X", head) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body
