"""Output files that appear all at once: written under temporary names, hashed on the way, renamed at the end."""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_kosmos.data.manifest import FileRecord

PARTIAL = ".partial"


class StagedFile:
    """A file that is written from its beginning to its end and knows its size and sha256."""

    def __init__(self, final_path: Path) -> None:
        self.final_path = final_path
        self.partial_path = final_path.with_name(final_path.name + PARTIAL)
        self._hash = hashlib.sha256()
        self._file = self.partial_path.open("wb")
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        """Append `data`; return its length, as files do."""
        self._hash.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def record(self) -> FileRecord:
        """Return what a manifest says of the file."""
        return FileRecord(bytes=self.num_bytes, sha256=self._hash.hexdigest())

    def close(self) -> None:
        """Bring the file to disk, still under its temporary name."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Close and delete the temporary file."""
        self._file.close()
        self.partial_path.unlink(missing_ok=True)


class Staging:
    """The files of one output prefix. Leaving the block without `commit` deletes what was written."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._files: list[StagedFile] = []
        self._committed = False

    def open(self, suffix: str) -> StagedFile:
        """Begin the file `PREFIX<suffix>`; its folder is made if need be."""
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        file = StagedFile(self.prefix.with_name(self.prefix.name + suffix))
        self._files.append(file)
        return file

    def records(self) -> dict[str, FileRecord]:
        """Return the record of each file so far, by its final name."""
        return {file.final_path.name: file.record() for file in self._files}

    def commit(self) -> None:
        """Give every file its final name, in the order in which they were opened."""
        for file in self._files:
            file.close()
        for file in self._files:
            file.partial_path.replace(file.final_path)
        self._committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            for file in self._files:
                file.discard()
