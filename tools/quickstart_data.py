"""The raw corpora of the quickstart, from installed packages alone: handwritten digits and Python's reference manual.

    python tools/quickstart_data.py --output DIR --seed 1

writes text, captions and interleaved documents, each as a training and a held-out corpus, the text that the tokenizer
trains on, and `corpora.yaml`, which lists them. A fifth of the digits and an eighth of the text documents are held out:
no held-out digit and no held-out paragraph occurs in a training document of any kind.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from webdataset.writer import TarWriter

from megatron_kosmos.data.loading.mixture import shuffled

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
DOCUMENT_CHARACTERS = 2_000
"""Manual pages are cut into documents of about this length, so that an eighth of the documents is a fair sample."""


@dataclass(frozen=True)
class Digit:
    """One handwritten digit."""

    number: int
    """Its place in the data set."""
    name: str
    png: bytes

    @property
    def caption(self) -> str:
        """What the picture shows."""
        return f"a handwritten {self.name}"


def read_digits() -> list[Digit]:
    """Return scikit-learn's 1,797 digits, 8 x 8 pixels of 17 greys, as pictures of 32 x 32."""
    pixels, labels = load_digits(return_X_y=True)
    grey: NDArray[np.uint8] = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    digits = []
    for number, label in enumerate(labels):
        image = Image.fromarray(grey[number]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        digits.append(Digit(number, NAMES[int(label)], buffer.getvalue()))
    return digits


def read_texts() -> list[str]:
    """Return the manual in documents of some paragraphs; a paragraph that several pages repeat comes once."""
    documents, seen = [], set()
    for page in topics.values():
        paragraphs: list[str] = []
        for paragraph in re.split(r"\n\s*\n", page):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
            if sum(map(len, paragraphs)) >= DOCUMENT_CHARACTERS:
                documents.append("\n\n".join(paragraphs))
                paragraphs = []
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def split(items: Sequence[Any], one_in: int, seed: int, stream: int) -> dict[str, list[Any]]:
    """Return `items` shuffled and split into "train" and "heldout", which gets one in `one_in`."""
    order = shuffled(len(items), seed, stream)
    num_heldout = len(items) // one_in
    return {"heldout": [items[i] for i in order[:num_heldout]], "train": [items[i] for i in order[num_heldout:]]}


def interleave(digits: Sequence[Digit]) -> Iterator[list[str | Digit]]:
    """Yield documents of two to four pictures and the words between them; every digit occurs once.

    In two documents of three the words that name a picture follow it, in the third they lead to it.
    """
    start = 0
    for number in count():
        group = digits[start : start + 2 + number % 3]
        if not group:
            return
        start += len(group)
        parts: list[str | Digit] = []
        if number // 3 % 3 == 2:
            for digit in group:
                parts += [f"and this is {digit.caption}:" if parts else f"This is {digit.caption}:", digit]
            parts.append("and that was the last.")
        else:
            parts.append(f"Here are {NAMES[len(group)]} pictures. The first is" if len(group) > 1 else "Here is")
            for digit in group:
                parts += [digit, f"{digit.caption}." if digit is group[-1] else f"{digit.caption}, and the next is"]
        yield parts


def write_captions_tar(path: Path, digits: Iterable[Digit]) -> None:
    """Write pictures and captions as a webdataset tar."""
    with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for digit in digits:
            tar.write({"__key__": f"{digit.number:04d}", "png": digit.png, "txt": digit.caption.encode()})


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def interleaved_line(document: Iterable[str | Digit]) -> dict[str, Any]:
    """Return a document as `kosmos preprocess interleaved` reads it."""
    return {"parts": [{"text": p} if isinstance(p, str) else {"image": picture_path(p)} for p in document]}


def picture_path(digit: Digit) -> str:
    """Return where a digit's file lies in the output folder."""
    return f"images/{digit.number:04d}.png"


def make(output: Path, seed: int) -> None:
    """Write everything to the folder `output`."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    digits, texts = split(read_digits(), 5, seed, 0), split(read_texts(), 8, seed, 1)
    interleaved = {part: list(interleave(digits[part])) for part in digits}
    for digit in (*digits["train"], *digits["heldout"]):
        (output / picture_path(digit)).write_bytes(digit.png)
    for part in ("train", "heldout"):
        write_lines(output / f"text_{part}.jsonl", ({"text": text} for text in texts[part]))
        write_lines(output / f"interleaved_{part}.jsonl", map(interleaved_line, interleaved[part]))
    # Two forms of caption corpus, so that the quickstart goes both ways.
    write_captions_tar(output / "captions_train.tar", digits["train"])
    heldout = ({"image": picture_path(digit), "caption": digit.caption} for digit in digits["heldout"])
    write_lines(output / "captions_heldout.jsonl", heldout)
    spoken = [digit.caption for digit in digits["train"]]
    spoken += [part for document in interleaved["train"] for part in document if isinstance(part, str)]
    (output / "tokenizer.txt").write_text("\n".join([*texts["train"], *spoken]) + "\n", encoding="utf-8")
    (output / "corpora.yaml").write_text(yaml.safe_dump(corpora(), sort_keys=False), encoding="utf-8")


def corpora() -> dict[str, Any]:
    """Return what to make of the files, in paths relative to their folder."""
    entries = []
    for part in ("train", "heldout"):
        captions = "captions_train.tar" if part == "train" else "captions_heldout.jsonl"
        for command, inputs in (
            ("text", f"text_{part}.jsonl"),
            ("captions", captions),
            ("interleaved", f"interleaved_{part}.jsonl"),
        ):
            entries.append({"name": f"{command}_{part}", "command": command, "inputs": [inputs]})
    return {"tokenizer": {"inputs": ["tokenizer.txt"], "vocab_size": 1024}, "corpora": entries}


def main(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Chooses what is held out.")] = 1,
) -> None:
    """Write the raw corpora of the quickstart."""
    make(output, seed)
    typer.echo(f"{output / 'corpora.yaml'} lists the corpora")


if __name__ == "__main__":
    typer.run(main)
