"""How fast do pictures become pixels, against webdataset and Pillow, and how exactly? Writes results/images.json.

    .venv/bin/python benchmarks/images.py DATA/photos/*.jpg

The photographs are scaled to each size, encoded, and packed into image shards as preparation writes them. All ways
read those shards and end at the normalized float32 tensor; CPU seconds of one thread, alternating, median of the
rounds. PSNR is that of the pixels against transformers' processor on Pillow's full decode.
"""

import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import PIL
import torch
import typer
import webdataset
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from shards import write_shards
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

RESULTS = Path(__file__).parent / "results" / "images.json"
MIX = "JPEG"
"""Its sizes, as many pictures of each, stand for those of the web: most of LAION's and COYO's are of 256 to 1,024."""
CASES = [
    *(("JPEG", short) for short in (256, 384, 480, 640, 768, 1024)),
    ("PNG", 256),
    ("PNG", 480),
    ("WEBP", 256),
    ("WEBP", 480),
]
COLUMNS = {
    "format": "{}",
    "short_side": "{}",
    "kilobytes": "{:.0f}",
    "per_cpu_second": "{:.0f}",
    "pillow_per_cpu_second": "{:.0f}",
    "ratio_to_pillow": "{:.2f}",
    "transformers_per_cpu_second": "{:.0f}",
    "ratio_to_transformers": "{:.2f}",
    "psnr_mean": "{:.1f}",
    "psnr_median": "{:.1f}",
    "psnr_min": "{:.1f}",
}
EXACT = 99.0
"""What is written for dB where no pixel differs."""


def main(
    photos: Annotated[list[Path], typer.Argument(help="Photographs; those below the largest size are left out.")],
    image_size: Annotated[int, typer.Option(help="S, the model's side.")] = 224,
    rounds: Annotated[int, typer.Option(help="Times that each way reads all pictures.")] = 5,
) -> None:
    """Measure each format and size one after the other, print a table and write it."""
    torch.set_num_threads(1)
    largest = max(short for _, short in CASES)
    originals = [image.convert("RGB") for path in photos if min((image := Image.open(path)).size) >= largest]
    rows = []
    for file_format, short in CASES:
        with tempfile.TemporaryDirectory() as folder:
            pictures = [encoded(photo, file_format, short) for photo in originals]
            write_shards(Path(folder) / "a", pictures, file_format.lower().replace("jpeg", "jpg"))
            rows.append(measure(Path(folder) / "a", image_size, rounds))
        rows[-1] |= {
            "format": file_format,
            "short_side": short,
            "kilobytes": statistics.mean(map(len, pictures)) / 1024,
        }
    table = Table(*(name.replace("_", " ") for name in COLUMNS))
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, form in COLUMNS.items()))
    mix = [sum(1 / row[f"{way}per_cpu_second"] for row in rows if row["format"] == MIX) for way in ("pillow_", "")]
    Console().print(table)
    print(f"all sizes of {MIX} together: {mix[0] / mix[1]:.2f} times webdataset and Pillow")
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"Pillow {PIL.__version__}, torch {torch.__version__}"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "machine": machine,
                "photos": len(photos),
                "image_size": image_size,
                "ratio_of_mix": mix[0] / mix[1],
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


def encoded(photo: Image.Image, file_format: str, short: int) -> bytes:
    """Return a photograph whose short side became `short`, as img2dataset writes it (quality 95)."""
    scale = short / min(photo.size)
    smaller = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, file_format, **({} if file_format == "PNG" else {"quality": 95}))
    return buffer.getvalue()


def measure(prefix: Path, image_size: int, rounds: int) -> dict[str, float]:
    """Return speeds, ratios and PSNR of the pictures at `prefix`."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    ways: dict[str, Callable[[], Iterator[Tensor]]] = {
        "": lambda: ours(prefix, image_size),
        "pillow_": lambda: theirs(prefix, lambda image: by_pillow(image, image_size)),
        "transformers_": lambda: theirs(prefix, lambda image: processor(image, return_tensors="pt")["pixel_values"][0]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start, count = time.process_time(), sum(1 for _ in way())
            seconds[name].append((time.process_time() - start) / count)
    speeds = {name: 1 / statistics.median(times[1:]) for name, times in seconds.items()}
    pairs = zip(ways[""](), ways["transformers_"](), strict=True)
    decibels = [psnr(levels(actual), levels(expected)) for actual, expected in pairs]
    return {f"{name}per_cpu_second": speed for name, speed in speeds.items()} | {
        "ratio_to_pillow": speeds[""] / speeds["pillow_"],
        "ratio_to_transformers": speeds[""] / speeds["transformers_"],
        "psnr_mean": statistics.mean(decibels),
        "psnr_median": statistics.median(decibels),
        "psnr_min": min(decibels),
    }


def ours(prefix: Path, image_size: int) -> Iterator[Tensor]:
    """Yield the pictures as training reads them."""
    store = ImageStore(prefix)
    for number in range(len(store.positions)):
        yield load_image(store.read(number), image_size)


def theirs(prefix: Path, preprocess: Callable[[Image.Image], Tensor]) -> Iterator[Tensor]:
    """Yield the pictures by webdataset and Pillow's full decoding."""
    shard = str(prefix.with_name(f"{prefix.name}-images-00000.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = webdataset.WebDataset(shard, shardshuffle=False, empty_check=False).decode("pilrgb")
    for sample in samples:
        (image,) = (value for key, value in sample.items() if not key.startswith("__"))
        yield preprocess(image)


def by_pillow(image: Image.Image, image_size: int) -> Tensor:
    """Return what CLIPImageProcessorPil does, written as sparingly as numpy allows."""
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((left, top, left + image_size, top + image_size)), np.float32)
    mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1))


def levels(pixels: Tensor) -> NDArray[np.float64]:
    """Return normalized pixels as levels of 0 … 255."""
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return ((pixels * std + mean) * 255).round().double().numpy()


def psnr(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return how close pixels are, in dB."""
    error = float(np.mean((actual - expected) ** 2))
    return EXACT if error == 0 else 10 * float(np.log10(255**2 / error))


if __name__ == "__main__":
    typer.run(main)
