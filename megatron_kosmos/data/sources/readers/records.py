"""Records: documents as they lie in their files, not looked into yet."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

EXCERPT_BYTES = 1000
"""What a report of a bad record shows of it."""
MAX_RECORD_BYTES = 64 << 20
"""The most that one line, file of text, row or member of a tar may have, decompressed: what a reader holds of it."""


@dataclass(frozen=True)
class Sample:
    """The members of a tar that share a key, such as `000012.jpg` and `000012.txt`."""

    key: str
    members: Mapping[str, bytes]
    """Content by extension, in lower case."""


@dataclass(frozen=True)
class Row:
    """A row of a table: JSON's types, and bytes."""

    values: Mapping[str, Any]
    num_bytes: int
    """Bytes that it has in memory, about."""


@dataclass(frozen=True)
class Lines:
    """Whole lines of a file, one behind the other, so that they travel between processes as one."""

    data: bytes


@dataclass(frozen=True)
class Unreadable:
    """Stands for a record that cannot be read, or for the rest of a damaged file."""

    reason: str
    detail: str


class RawRecord(NamedTuple):
    """One document as its file has it, or many as `Lines`. A tuple, since there are millions."""

    file: Path
    place: str
    """Number of the (first) line, `row N` (both from 1), or key of the members of a tar."""
    content: bytes | Sample | Row | Unreadable | Lines
    offset: int = 0
    """Bytes of the file that are read once this record is, compressed ones where it is compressed: its progress."""

    @property
    def origin(self) -> str:
        """Where a person finds it."""
        return f"{self.file}:{self.place}"

    @property
    def excerpt(self) -> str | None:
        """How a line or file of text begins, whatever its bytes are."""
        if not isinstance(self.content, bytes):
            return None
        return self.content[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in memory, about."""
        match self.content:
            case Sample(members=members):
                return sum(map(len, members.values()))
            case Row(num_bytes=num_bytes):
                return num_bytes
            case Lines(data=data):
                return len(data)
            case Unreadable():
                return 0
            case data:
                return len(data)

    def each(self) -> Iterator["RawRecord"]:
        """Yield the documents that it stands for: itself, or lines that are more than white space."""
        if not isinstance(self.content, Lines):
            yield self
            return
        for number, line in enumerate(io.BytesIO(self.content.data), int(self.place)):
            if not line.isspace():
                yield RawRecord(self.file, str(number), line, self.offset)


class DamagedFile(Exception):
    """A file that cannot be read any further, with the `place` where that was."""

    def __init__(self, file: Path, place: str, detail: str) -> None:
        super().__init__(file, place, detail)
        self.file, self.place, self.detail = file, place, detail


def too_large(num_bytes: int, limit: int, what: str) -> Unreadable:
    """Return what stands for a record of more than `limit` bytes."""
    return Unreadable("too_large", f"{what} has {num_bytes:,} bytes; {limit:,} are the most")
