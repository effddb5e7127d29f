"""Inputs of each kind for preparation in many small parts: several files, bad records, filtered ones, duplicates."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet

from megatron_kosmos.prompt import SourceKind

PART_BYTES: dict[SourceKind, int] = {"text": 1500, "caption": 4000, "interleaved": 1500}
"""Each kind comes in about seven parts."""
NUM_PICTURES = 12
Picture = Callable[..., bytes]


def make_inputs(folder: Path, kind: SourceKind, picture: Picture) -> tuple[Path, ...]:
    """Write files of documents of `kind` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [picture(seed, width=6, height=5) for seed in range(NUM_PICTURES)]
    for number, data in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(data)
    draw = random.Random(kind)
    match kind:
        case "text":
            return _texts(folder, draw)
        case "caption":
            return _captions(folder, draw, pictures)
        case _:
            return _pages(folder, draw)


def _texts(folder: Path, draw: random.Random) -> tuple[Path, ...]:
    lines = [json.dumps({"text": f"number {draw.randrange(60)} " * draw.randrange(1, 12)}) for _ in range(90)]
    lines[7], lines[40], lines[81] = "{", '{"text": ""}', '{"text": 5}'
    lines[50] = json.dumps({"text": "longer than three parts " * 250})
    files = tuple(folder / name for name in ("a.jsonl", "empty.jsonl", "b.jsonl.gz", "c.txt"))
    files[0].write_text("".join(f"{line}\n" for line in lines[:60]))
    files[1].touch()
    compressed = pyarrow.Codec("gzip").compress("".join(f"{line}\n" for line in lines[60:]).encode(), asbytes=True)
    files[2].write_bytes(compressed[:-9])  # a damaged file
    files[3].write_text("A file.\nTwo lines.")
    return files


def _captions(folder: Path, draw: random.Random, pictures: list[bytes]) -> tuple[Path, ...]:
    pairs = [
        {"image": f"{draw.randrange(NUM_PICTURES + 1)}.png", "caption": f"{draw.randrange(30)}"} for _ in range(50)
    ]
    files = tuple(folder / name for name in ("list.jsonl", "pairs.tar", "pairs.parquet"))
    files[0].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))  # one picture is missing
    with tarfile.open(files[1], "w") as tar:
        for number in range(8):
            for extension, data in (("png", pictures[draw.randrange(NUM_PICTURES)]), ("txt", b"in a tar")):
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = [{"image": pictures[draw.randrange(NUM_PICTURES)], "caption": "in a table"} for _ in range(12)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), files[2])
    return files


def _pages(folder: Path, draw: random.Random) -> tuple[Path, ...]:
    def page() -> str:
        parts: list[dict[str, str]] = [{"text": f"page {draw.randrange(4)}"}]
        parts += [{"image": f"{draw.randrange(NUM_PICTURES)}.png"} for _ in range(draw.randrange(4))]
        return json.dumps({"parts": parts})

    files = folder / "a.jsonl", folder / "b.jsonl", folder / "page.html"
    files[0].write_text("".join(page() + "\n" for _ in range(70)))
    files[1].write_text("[]\n" + "".join(page() + "\n" for _ in range(70)))
    files[2].write_text("<p>one<img src='0.png'>two")
    return files


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` by its path in there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
