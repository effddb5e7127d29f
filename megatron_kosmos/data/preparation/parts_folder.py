"""`PREFIX.parts`: the parts of a corpus that is being prepared, and the job that they belong to.

A part appears under its number once it is whole; until then its folder has the name of the process that writes it. So
processes may share the folder, and one that is killed leaves nothing that could be taken for a part.
"""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from pydantic import ValidationError

from megatron_kosmos.data.corpora.hashed_file import HashedFile, fsync_folder, told_when_full
from megatron_kosmos.data.corpora.indexed import token_dtype
from megatron_kosmos.data.corpora.manifest import Job, as_file, path_with
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.preparation.part import Part, PartWriter

SUFFIX = ".parts"
DISCARDED_SUFFIX = ".parts.discarded"
JOB = "job.json"
PARTIAL = ".partial-"
SHARDS = "shards-of-"


class PartsFolder:
    """The folder of the parts of one output prefix, which may not be there yet."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.path = path_with(prefix, SUFFIX)

    def job(self) -> Job | None:
        """Return the job that the parts belong to, None without such a folder. Raises DataError."""
        path = self.path / JOB
        try:
            return Job.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DataError(f"{path} is damaged; delete the folder {self.path} and prepare again: {error}") from error

    def create(self, job: Job) -> None:
        """Make the folder for `job`, unless another process just did. Raises DataError."""
        new, is_there = own_name(self.path), False
        while not is_there:
            with told_when_full(self.path):
                self.prefix.parent.mkdir(parents=True, exist_ok=True)
                new.mkdir()
            with suppress(FileNotFoundError):  # it was taken for a leftover on another machine: again
                record = HashedFile(new / JOB)
                record.write(as_file(job))
                record.close()
                fsync_folder(new)
                put_in_place(new, self.path)
                is_there = True

    def part_path(self, number: int) -> Path:
        """Return the folder of a part."""
        return self.path / f"{number:06d}"

    def is_unused(self) -> bool:
        """Return whether neither a part is there nor a process that writes one."""
        return {path.name for path in self.path.glob("*")} <= {JOB}

    @contextmanager
    def writing(self, job: Job, number: int) -> Iterator[PartWriter]:
        """Give a part to write, which gets its name at the end of the block. Raises DataError when the disk is full.

        If another process has written it meanwhile, which makes no difference, that one is kept.
        """
        folder = self.part_path(number)
        new, dtype = own_name(folder), token_dtype(job.vocab_size)
        try:
            with PartWriter(new, number, dtype, job.settings.max_shard_bytes) as writer:
                yield writer
                writer.finish()
                put_in_place(new, folder)
        except FileNotFoundError as error:
            if Path(error.filename or "") != new and new not in Path(error.filename or "").parents:
                raise
            raise DataError(
                f"{new} has vanished: another process prepares or assembled the same parts; let one of them do it"
            ) from error

    def problem_of(self, number: int) -> str | None:
        """Return why a part cannot be used, as far as the sizes of its files tell; None if it can."""
        if not self.part_path(number).is_dir():
            return "missing"
        try:
            Part(self.part_path(number))
        except DataError as error:
            return str(error)
        return None

    def clear(self, numbers: Sequence[int]) -> None:
        """Delete what killed processes left of the parts, and parts that are damaged."""
        for folder in map(self.part_path, numbers):
            remove_leftovers(folder)
        for number in numbers:
            folder = self.part_path(number)
            if folder.is_dir() and self.problem_of(number):
                folder.rename(own_name(folder))
                shutil.rmtree(own_name(folder))

    def note_shards(self, num_shards: int) -> None:
        """Leave a note for `shards`."""
        (self.path / f"{SHARDS}{num_shards}").touch()

    def shards(self) -> list[int]:
        """Return the numbers of shards that processes wrote parts for."""
        return sorted(int(path.name.removeprefix(SHARDS)) for path in self.path.glob(f"{SHARDS}*"))

    def discard(self) -> None:
        """Delete the folder; killed on the way, `remove_discarded` does the rest."""
        self.remove_discarded()
        if self.path.exists():
            discarded = path_with(self.prefix, DISCARDED_SUFFIX)
            self.path.rename(discarded)
            shutil.rmtree(discarded)

    def remove_discarded(self) -> None:
        """Delete what killed processes left beside the folder."""
        shutil.rmtree(path_with(self.prefix, DISCARDED_SUFFIX), ignore_errors=True)
        remove_leftovers(self.path)


def put_in_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path` unless that is there, and bring the name to disk."""
    try:
        new.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(new)
    fsync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Delete the folders that processes which are no longer there left of `path`."""
    own_host = f"{PARTIAL}{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{escape(path.name)}{PARTIAL}*"):
        _, is_here, process = leftover.name.partition(own_host)
        # Behind the name of a host that begins with this one's there is more than a number.
        if not (is_here and process.isdecimal() and _is_alive(int(process))):
            shutil.rmtree(leftover, ignore_errors=True)


def own_name(path: Path) -> Path:
    """Return the name under which this process writes the folder `path`."""
    return path_with(path, f"{PARTIAL}{socket.gethostname()}-{os.getpid()}")


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # it writes nothing yet: one with its number did
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
