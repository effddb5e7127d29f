"""Whatever happens to the bytes of an input file, reading it ends with documents and bad documents, nothing else."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.sources.documents import parse_record, read_records
from megatron_kosmos.prompt import SourceKind

TEXTS = [{"text": f"text {n} " + "x" * (n * 37 % 300)} for n in range(300)]
PAGES = {"images": [[None, b"raw"]] * 100, "texts": [["One.", None]] * 100}
HTML = b"<p>one <img src='a.png'> two<table><tr><td>x<pre>\n y</pre></table><script>1</script><!-- -->" * 30
NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.tsv", "a.html", "a.tar", "texts.parquet", "pages.parquet"]


def sound(name: str, compress: Callable[[bytes, str], bytes]) -> tuple[SourceKind, bytes]:
    """Return a file without fault."""
    buffer = io.BytesIO()
    match name.split("."):
        case ["a", "jsonl", *_]:
            lines = "".join(json.dumps(text) + "\n" for text in TEXTS).encode()
            return "text", compress(lines, Path(name).suffix.replace(".jsonl", ""))
        case ["a", "tsv"]:
            return "caption", b"a caption\ta.png\n" * 200
        case ["a", "html"]:
            return "interleaved", HTML
        case ["a", "tar"]:
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for member in (f"{number}.{extension}" for number in range(30) for extension in ("png", "txt")):
                    info = tarfile.TarInfo(member)
                    info.size = len(member) * 100
                    tar.addfile(info, io.BytesIO(b"x" * info.size))
            return "caption", buffer.getvalue()
        case ["texts", _]:
            parquet.write_table(pyarrow.Table.from_pylist(TEXTS), buffer, row_group_size=50)
            return "text", buffer.getvalue()
        case _:
            parquet.write_table(pyarrow.table(PAGES), buffer, row_group_size=50)
            return "interleaved", buffer.getvalue()


def damage(content: bytes, seed: int) -> bytes:
    """Return `content` with a few bytes changed, deleted or added, half of the time near its end."""
    draw, damaged = random.Random(seed), bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(damaged)) if draw.random() < 0.5 else -1 - draw.randrange(min(len(damaged), 700))
        at %= len(damaged)
        match draw.randrange(4):
            case 0:
                damaged[at] = draw.randrange(256)
            case 1:
                damaged[at : at + 8] = draw.randbytes(8)
            case 2:
                del damaged[at : at + draw.randrange(50)]
            case 3:
                damaged[at:at] = draw.randbytes(draw.randrange(9))
    return bytes(damaged)


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_a_bad_document(compress: Callable[[bytes, str], bytes], tmp_path: Path, name: str) -> None:
    kind, content = sound(name, compress)
    file = tmp_path / name
    outcomes = []
    for seed in range(40):
        file.write_bytes(damage(content, seed))
        try:
            for record in read_records(kind, file):
                outcomes.append("good")
                try:
                    parse_record(kind, record)
                except BadDocument as problem:
                    outcomes[-1] = problem.reason
        except DataError as problem:  # columns that lost their names
            outcomes.append(type(problem).__name__)
    assert set(outcomes) - {"good", "DataError"}
