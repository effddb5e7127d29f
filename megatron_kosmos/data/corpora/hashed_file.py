"""An output file that is written from beginning to end, knows its size and sha256, and tells when the disk is full."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_kosmos.data.corpora.manifest import FileRecord
from megatron_kosmos.data.errors import DataError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, a quota is used up, or a file may not grow any further."""


class HashedFile:
    """A new file; every failure for lack of room is a DataError that says what to do."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes = path, 0
        self._hash = hashlib.sha256()
        with told_when_full(path):
            self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        """Append `data`; return its length, as files do. Raises DataError."""
        self._hash.update(data)
        self.num_bytes += len(data)
        with told_when_full(self.path, self.num_bytes):
            return self._file.write(data)

    def close(self) -> FileRecord:
        """Bring the file to disk and return what a manifest says of it. Raises DataError."""
        with told_when_full(self.path, self.num_bytes):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return FileRecord(bytes=self.num_bytes, sha256=self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the file as it is."""
        with suppress(OSError):  # what is buffered finds no room either
            self._file.close()


@contextmanager
def told_when_full(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn lack of room for `needed` bytes at `path` into a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        there = path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"no room for {path} ({error.strerror}): it needs {needed:,} bytes by now, {there:,} are there, "
            f"{shutil.disk_usage(path.parent).free:,} are free on its disk; what is finished is kept: make room and "
            f"run the same command again, and it goes on from there"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Bring the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
