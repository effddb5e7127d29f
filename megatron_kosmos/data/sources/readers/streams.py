"""Readers of lines and of whole files, plain or compressed with gzip or zstandard, in bounded memory."""

import io
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_kosmos.data.sources.readers.records import (
    MAX_RECORD_BYTES,
    DamagedFile,
    Lines,
    RawRecord,
    Unreadable,
    too_large,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 1 << 20
DECOMPRESSED_BYTES = 1 << 16
"""What is decompressed at once."""


@lru_cache(maxsize=1024)  # asked for every record
def format_suffix(file: Path) -> str:
    """Return the extension that names the format: `.jsonl` of `a.jsonl.zst`."""
    return (file.with_suffix("") if file.suffix in COMPRESSIONS else file).suffix


def read_lines(file: Path, block_bytes: int) -> Iterator[RawRecord]:
    """Yield the lines of `file` in blocks of `block_bytes`, and by itself a line that begins in one and ends behind it.

    Where the blocks are cut depends on the file and `block_bytes` alone. Raises DamagedFile.
    """
    number = 1
    with _open(file) as (stream, compressed):
        try:
            while block := stream.read1(block_bytes):
                if number == 1:
                    block = block.removeprefix(BOM_UTF8)
                end = block.rfind(b"\n") + 1
                if end:
                    yield RawRecord(file, str(number), Lines(block[:end]), compressed.tell())
                    number += block.count(b"\n")
                if end < len(block):
                    line = block[end:] + stream.readline(MAX_RECORD_BYTES + 1)
                    content: bytes | Unreadable = line
                    if len(line) > MAX_RECORD_BYTES:
                        num_bytes = len(line) + _skip_line(stream, line)
                        content = too_large(num_bytes, MAX_RECORD_BYTES, "the line")
                    if not line.isspace():
                        yield RawRecord(file, str(number), content, compressed.tell())
                    number += 1
        except OSError as error:
            raise DamagedFile(file, str(number), f"the file cannot be read from here on: {error}") from error


def read_whole(file: Path, limit: int = MAX_RECORD_BYTES) -> Iterator[RawRecord]:
    """Yield the content of `file` as its only record. Raises DamagedFile."""
    with _open(file) as (stream, compressed):
        try:
            content = stream.read(limit + 1)
        except OSError as error:
            raise DamagedFile(file, "1", f"the file cannot be read: {error}") from error
        if len(content) <= limit:
            yield RawRecord(file, "1", content, compressed.tell())
        else:
            large = too_large(_length(stream, content), limit, "the file, which would be one document,")
            yield RawRecord(file, "1", large, compressed.tell())


@contextmanager
def _open(file: Path) -> "Iterator[tuple[io.BufferedReader[Any], BinaryIO]]":
    """Give the decompressed stream, whose errors are OSErrors, and the one whose position is that in the file."""
    with io.BufferedReader(io.FileIO(file), BUFFER_BYTES) as plain:
        if file.suffix not in COMPRESSIONS:
            yield plain, plain
        else:
            yield io.BufferedReader(_Decompressed(file, plain), DECOMPRESSED_BYTES), plain


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, to the last byte before the place where it is cut or damaged."""

    def __init__(self, file: Path, plain: BinaryIO) -> None:
        self._file = file
        self._source = _decompress(file, plain)
        self._num_read = 0
        self._damage: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` from its beginning; return the number of bytes. Raises OSError where there are none left."""
        if self._damage is not None:
            raise self._damage
        view = memoryview(buffer).cast("B")
        try:
            data = self._source.read(len(view))
        except OSError as damage:
            self._damage = damage
            data = self._read_up_to_damage(len(view))
            if not data:
                raise
        view[: len(data)] = data
        self._num_read += len(data)
        return len(data)

    def _read_up_to_damage(self, limit: int) -> bytes:
        """Return what can be read of the next `limit` bytes: from the beginning again, and then byte by byte."""
        data, before = bytearray(), self._num_read
        with self._file.open("rb") as plain, suppress(OSError):
            source = _decompress(self._file, plain)
            while before:
                before -= len(source.read(min(BUFFER_BYTES, before)))
            while len(data) < limit and (byte := source.read(1)):
                data += byte
        return bytes(data)


def _decompress(file: Path, plain: BinaryIO) -> BinaryIO:
    import pyarrow  # here, since processes that read nothing compressed need not load it

    # Unlike the decompressors of Python's gzip and of zstandard, it takes a cut file of either kind for an error.
    source: BinaryIO = pyarrow.CompressedInputStream(pyarrow.PythonFile(plain, mode="r"), COMPRESSIONS[file.suffix])
    return source


def _skip_line(stream: BinaryIO, piece: bytes) -> int:
    """Read on to the end of the line that begins with `piece`; return the number of bytes that were skipped."""
    num_bytes = 0
    while not piece.endswith(b"\n") and (piece := stream.readline(BUFFER_BYTES)):
        num_bytes += len(piece)
    return num_bytes


def _length(stream: BinaryIO, begin: bytes) -> int:
    num_bytes = len(begin)
    while piece := stream.read(BUFFER_BYTES):
        num_bytes += len(piece)
    return num_bytes
