"""Files that one process of a run makes and all others read through mmap: whole or absent, and never damaged."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_kosmos.data.arrays import Int64Array

DIGEST_INTS = hashlib.sha256().digest_size // 8


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time in. Where files cannot be locked all go in at once, and come to the same result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is there when it is whole. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Sequence[Int64Array]) -> None:
    """Write arrays one behind the other, then the sha256 of all that. Raises OSError."""

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for array in arrays:
            content = np.ascontiguousarray(array).data
            digest.update(content)
            file.write(content)
        file.write(digest.digest())

    write_whole(path, write)


def read_arrays(path: Path) -> Int64Array | None:
    """Return what `write_arrays` wrote, through mmap; None where it is absent or damaged."""
    try:
        content = np.memmap(path, dtype=np.int64, mode="r").view(np.ndarray)
    except (OSError, ValueError):  # absent, empty, or of no whole number of integers
        return None
    arrays, checksum = content[:-DIGEST_INTS], content[-DIGEST_INTS:]
    return arrays if hashlib.sha256(arrays.data).digest() == checksum.tobytes() else None
