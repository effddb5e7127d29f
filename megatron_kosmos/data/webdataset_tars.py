"""A reader of users' webdataset tars: members that share a key form a sample. Nothing is ever extracted to disk."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmos.data.errors import DataError


@dataclass(frozen=True)
class Sample:
    """The members of one key, such as `000012.jpg` and `000012.txt`."""

    key: str
    members: dict[str, bytes]
    """Content by extension, in lower case."""


def read_tar(file: Path) -> Iterator[Sample]:
    """Yield the samples of `file` in order. Raises DataError when it is damaged or repeats a name."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # here, since webdataset imports torch

    _check_end(file)
    key = "the first sample"
    with file.open("rb") as stream:
        try:
            for sample in group_by_keys(tar_file_expander([{"url": str(file), "stream": stream}])):
                key = sample["__key__"]
                yield Sample(key, {name: data for name, data in sample.items() if not name.startswith("__")})
        except (tarfile.TarError, ValueError, OSError) as error:
            raise DataError(f"{file}: cannot be read after {key}: {error.args[0] if error.args else error}") from error


def _check_end(file: Path) -> None:
    """Raise DataError unless the tar ends with its end mark: Python's tarfile takes a cut header for the end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - 1024))
        end = stream.read()
    if size % tarfile.BLOCKSIZE or end != bytes(1024):
        raise DataError(f"{file} is truncated: after {size} bytes there is no end-of-archive mark; get the file again")
