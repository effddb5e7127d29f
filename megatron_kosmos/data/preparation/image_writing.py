"""Writing the pictures of a corpus: the tars of its parts, and the index of all (image_store.py has the format)."""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_kosmos.data.corpora.hashed_file import HashedFile
from megatron_kosmos.data.corpora.image_store import HEADER, MAGIC, VERSION
from megatron_kosmos.data.preparation.encoding import EncodedImage
from megatron_kosmos.data.preparation.tables import Tables


class ImageTarWriter:
    """Writes the pictures of a part's documents into tars `images-00000.tar` …; a full one is followed by another."""

    def __init__(self, open_file: Callable[[str], HashedFile], part: str, max_shard_bytes: int) -> None:
        self._open_file, self._part, self._max_shard_bytes = open_file, part, max_shard_bytes
        self._names: list[str] = []
        self._writer: Any = None

    def append(self, document: int, images: Sequence[EncodedImage]) -> Iterator[int]:
        """Write the pictures of a document of the part; yield the number of the tar and the offset of each."""
        for number, image in enumerate(images):
            if self._writer is None or self._writer.tarstream.offset >= self._max_shard_bytes:
                self._begin_tar()
            key = f"{self._part}-{document:09d}.{number:04d}"
            self._writer.write({"__key__": key, image.extension: image.data})
            yield len(self._names) - 1
            yield self._writer.tarstream.offset - -(-len(image.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def _begin_tar(self) -> None:
        from webdataset.writer import TarWriter  # here, since webdataset imports torch

        if self._writer is not None:
            self._writer.close()
        self._names.append(f"images-{len(self._names):05d}.tar")
        self._writer = TarWriter(self._open_file(self._names[-1]), user="", group="", encoder=False, mtime=0)

    def finish(self) -> tuple[str, ...]:
        """End the last tar; return the names of all."""
        if self._writer is not None:
            self._writer.close()
        return tuple(self._names)


def write_image_index(
    file: HashedFile, num_documents: int, num_images: int, tables: Callable[[], Iterable[Tables]]
) -> None:
    """Write the index of the pictures that `tables` gives, piece by piece, with `tar` for the number of the shard."""
    file.write(HEADER.pack(MAGIC, VERSION, num_documents, num_images))
    first = np.zeros(1, dtype="<i8")
    file.write(first.tobytes())
    for part in tables():
        ends = first + np.cumsum(part.documents["images"], dtype="<i8")
        file.write(ends.tobytes())
        first = ends[-1:] if len(ends) else first
    for column in ("offset", "size", "tar", "position"):
        for part in tables():
            file.write(part.images[column].tobytes())
