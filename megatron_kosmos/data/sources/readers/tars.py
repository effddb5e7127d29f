"""The reader of webdataset tars: members that share a key form a sample. Nothing is ever extracted to disk."""

import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_kosmos.data.sources.readers.records import (
    MAX_RECORD_BYTES,
    DamagedFile,
    RawRecord,
    Sample,
    Unreadable,
    too_large,
)

END_MARK = bytes(2 * tarfile.BLOCKSIZE)
MAX_HEADER_BYTES = 1 << 16
"""The most that a long name or a pax header may have: tarfile would take as much memory as the header asks for."""
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""As webdataset splits names (its `base_plus_ext`): at the first dot of the last part."""


class _Member(NamedTuple):
    """A file in a tar."""

    key: str
    extension: str
    content: bytes | Unreadable


def read_tar(file: Path) -> Iterator[RawRecord]:
    """Yield the samples of `file` in order, as webdataset groups them. Raises DamagedFile."""
    last = "the first sample"
    with file.open("rb") as stream:
        try:
            for key, members in groupby(_members(stream), key=lambda member: member.key):
                content = _sample(key, members)
                last = key
                yield RawRecord(file, key, content, stream.tell())
        except Exception as error:  # tarfile raises nearly anything for damaged headers: IndexError, RecursionError …
            detail = error.args[0] if error.args else type(error).__name__
            raise DamagedFile(file, last, f"the tar cannot be read after this: {detail}") from error


def _sample(key: str, members: Iterable[_Member]) -> Sample | Unreadable:
    contents: dict[str, bytes] = {}
    unreadable = None
    for member in members:
        if isinstance(member.content, Unreadable):
            unreadable = unreadable or member.content
        elif member.extension in contents:
            name = f"{key}.{member.extension}"
            unreadable = unreadable or Unreadable("duplicate_name", f"the tar has {name} more than once")
        else:
            contents[member.extension] = member.content
    return unreadable or Sample(key, contents)


def _members(stream: BinaryIO) -> Iterator[_Member]:
    """Yield the files in a tar: no links, devices, folders, webdataset's own notes, or names without extension."""
    with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members = []  # else it keeps them all
            if member.size < 0 or tar.offset <= member.offset:  # tarfile would go back, and read for ever
                raise tarfile.ReadError(f"{member.name} has {member.size} bytes by its header")
            name = _KEY_AND_EXTENSION.fullmatch(member.name)
            if not member.isreg() or name is None or (member.name.startswith("__") and member.name.endswith("__")):
                continue
            yield _Member(name[1], name[2].lower(), _content(stream, tar, member))
        # tarfile takes a header that is cut or damaged for the end.
        stream.seek(tar.offset)
        if stream.read(len(END_MARK)) != END_MARK:
            raise tarfile.ReadError(
                f"truncated or damaged: at byte {tar.offset} there is neither a member nor the end-of-archive mark;"
                " get the file again"
            )


def _content(stream: BinaryIO, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Unreadable:
    if member.size > MAX_RECORD_BYTES:
        return too_large(member.size, MAX_RECORD_BYTES, member.name)
    if member.issparse():
        content = tar.extractfile(member)
        assert content is not None, "it is a regular file"
        return b"".join(iter(lambda: content.read(MAX_HEADER_BYTES), b""))  # no more at once than _Headers reads
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError(f"unexpected end of data in {member.name}")
    return data


class _Headers:
    """A tar as tarfile reads it, which refuses to read more at once than a header may have."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises ReadError for a size that no header has."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"a header says that {size:,} bytes belong to it; {MAX_HEADER_BYTES:,} are the most"
            )
        return self._stream.read(size)
