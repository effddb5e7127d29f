"""Compressed files read as plain ones do; what is cut, damaged or too large is one bad document with its place."""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kosmos.data.errors import BadDocument
from megatron_kosmos.data.sources.documents import parse_record, read_records, read_texts
from megatron_kosmos.data.sources.readers.records import MAX_RECORD_BYTES, RawRecord

Compress = Callable[[bytes, str], bytes]
COMPRESSED = [".gz", ".zst"]


def lines_of(num_lines: int) -> bytes:
    """Return lines that do not compress well, so that a file of some size is read in several steps."""
    words = random.Random(1)
    return b"".join(json.dumps({"text": f"{n} {words.getrandbits(4000):x}"}).encode() + b"\n" for n in range(num_lines))


def parse(record: RawRecord) -> str:
    return str(parse_record("text", record).parts[0])


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
def test_lines_and_their_places(compress: Compress, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compress(lines_of(5000) + b"\n \n" + lines_of(1), suffix))
    records = list(read_records("text", file))
    assert [record.place for record in records] == [*map(str, range(1, 5001)), "5003"]
    assert list(map(parse, records)) == [
        json.loads(line)["text"] for line in (lines_of(5000) + lines_of(1)).splitlines()
    ]
    offsets = [record.offset for record in records]
    assert offsets == sorted(offsets)
    assert 0 < offsets[0] < file.stat().st_size == offsets[-1]
    assert len(set(offsets)) > 3


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
def test_a_byte_order_mark_is_none_of_the_first_line(compress: Compress, tmp_path: Path, suffix: str) -> None:
    """Editors of Windows write it at the beginning of a file; in a text it is a character as others."""
    mark = "\ufeff"
    content = mark + "".join(json.dumps({"text": text}) + "\n" for text in ("one", f"{mark}two"))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compress(content.encode(), suffix))
    assert list(read_texts(file)) == ["one", f"{mark}two"]
    file.write_bytes(compress(mark.encode(), suffix))
    assert list(read_records("text", file)) == []


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_whole_file(compress: Compress, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(compress("ein\n\nText €\n".encode(), suffix))
    assert list(read_texts(file)) == ["ein\n\nText €\n"]


def decompress_gzip(data: bytes) -> bytes:
    """Return what zlib makes of a cut file: its members to the last byte."""
    whole = b""
    while data:
        member = zlib.decompressobj(wbits=31)
        whole += member.decompress(data)
        data = member.unused_data
    return whole


@pytest.mark.parametrize("cut", [1, 8, 20, 1000, 300_000, 500_000])
def test_every_whole_line_before_a_cut(compress: Compress, tmp_path: Path, cut: int) -> None:
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(compress(lines_of(1000), ".gz")[:-cut])
    *whole, damage = read_records("text", file)
    content = decompress_gzip(file.read_bytes())
    assert (
        b"".join(record.content for record in whole if isinstance(record.content, bytes))
        == content[: content.rfind(b"\n") + 1]
    )
    assert damage.place == str(len(whole) + 1)


def test_zstandard_up_to_the_last_block(compress: Compress, tmp_path: Path) -> None:
    """A block, of 128 KiB, is what it decompresses as a whole."""
    file = tmp_path / "cut.jsonl.zst"
    file.write_bytes(compress(lines_of(1000), ".zst")[:-1])
    *whole, _ = read_records("text", file)
    num_bytes = sum(len(record.content) for record in whole if isinstance(record.content, bytes))
    assert num_bytes > len(lines_of(1000)) - (128 << 10) - 1100


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("cut", [1, 20, 500_000])
def test_a_cut_file(compress: Compress, tmp_path: Path, suffix: str, cut: int) -> None:
    """The lines before the place are read, that which is cut is not, and the rest is a bad document."""
    file = tmp_path / f"cut.jsonl{suffix}"
    file.write_bytes(compress(lines_of(3000), suffix)[:-cut])
    *whole, damage = read_records("text", file)
    assert [parse(record).split()[0] for record in whole] == [str(n) for n in range(len(whole))]
    with pytest.raises(BadDocument) as caught:
        parse(damage)
    assert (caught.value.origin, caught.value.reason) == (f"{file}:{len(whole) + 1}", "damaged_file")
    assert "the file cannot be read from here on: Truncated compressed stream" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_name_that_lies(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(BadDocument, match=rf"{name}:1: the file cannot be read.*\[damaged_file\]"):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
def test_a_line_beyond_the_limit(compress: Compress, tmp_path: Path, suffix: str) -> None:
    """Lines around it are read; it is skipped in pieces, so that a file that unpacks to terabytes fits in memory."""
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(compress(b'{"text": "one"}\n' + b"x" * (MAX_RECORD_BYTES + 1) + b'\n{"text": "three"}\n', suffix))
    first, large, third = read_records("text", file)
    assert (parse(first), parse(third), third.place) == ("one", "three", "3")
    with pytest.raises(BadDocument, match=r":2: the line has 67,108,866 bytes; 67,108,864 are the most \[too_large\]"):
        parse(large)


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_whole_file_beyond_the_limit(compress: Compress, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(compress(b"x" * (MAX_RECORD_BYTES + 9), suffix))
    with pytest.raises(BadDocument, match=r"the file, which would be one document, has 67,108,873 bytes; .*too_large"):
        list(read_texts(file))
