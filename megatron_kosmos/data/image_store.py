"""The pictures of a corpus: tar shards that webdataset reads too, and an index for random access.

`PREFIX-images-00000.tar` … hold the pictures in order of appearance, as `<document>.<picture>.<extension>`.
`PREFIX.images.idx`, little-endian, for D documents and N pictures: magic, u64 version, u64 D, u64 N; i64[D + 1] first
picture of each document; i64[N] byte offset in the shard; i32[N] bytes; i32[N] shard; i32[N] index of its `<image>`
among the document's tokens.
"""

import mmap
import struct
import tarfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.data.encoding import EncodedImage
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.manifest import check_size, path_with
from megatron_kosmos.data.planning import ImagePlaces
from megatron_kosmos.data.staging import StagedFile

INDEX_SUFFIX = ".images.idx"
MAGIC = b"KOSMIMG\x00"
HEADER = struct.Struct("<8sQQQ")
VERSION = 1


def shard_suffix(number: int) -> str:
    """Return the end of the name of a shard."""
    return f"-images-{number:05d}.tar"


class ImageShardWriter:
    """Writes the pictures of documents one after the other; a shard that is full is followed by another."""

    def __init__(self, open_file: Callable[[str], StagedFile], max_shard_bytes: int) -> None:
        self._open_file, self._max_shard_bytes = open_file, max_shard_bytes
        self._num_shards = 0
        self._writer: Any = None
        self._first_images = array("q", [0])
        self._offsets, self._sizes, self._shards, self._positions = array("q"), array("i"), array("i"), array("i")

    @property
    def num_images(self) -> int:
        """Pictures so far."""
        return len(self._sizes)

    @property
    def places(self) -> ImagePlaces:
        """Where the pictures so far are in their documents."""
        return ImagePlaces(np.array(self._first_images), np.array(self._positions))

    def append(self, images: Sequence[EncodedImage]) -> None:
        """Write the pictures of the next document, which may have none."""
        document = len(self._first_images) - 1
        for number, image in enumerate(images):
            if self._writer is None or self._writer.tarstream.offset >= self._max_shard_bytes:
                self._begin_shard()
            self._writer.write({"__key__": f"{document:012d}.{number:04d}", image.extension: image.data})
            size = len(image.data)
            self._offsets.append(self._writer.tarstream.offset - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            self._sizes.append(size)
            self._shards.append(self._num_shards - 1)
            self._positions.append(image.position)
        self._first_images.append(self.num_images)

    def _begin_shard(self) -> None:
        from webdataset.writer import TarWriter  # here, since webdataset imports torch

        if self._writer is not None:
            self._writer.close()
        file = self._open_file(shard_suffix(self._num_shards))
        self._writer = TarWriter(file, user="", group="", encoder=False, mtime=0)
        self._num_shards += 1

    def finish(self) -> None:
        """Close the last shard and write the index."""
        if self._writer is not None:
            self._writer.close()
        index = self._open_file(INDEX_SUFFIX)
        index.write(HEADER.pack(MAGIC, VERSION, len(self._first_images) - 1, self.num_images))
        for values, dtype in (
            (self._first_images, "<i8"),
            (self._offsets, "<i8"),
            (self._sizes, "<i4"),
            (self._shards, "<i4"),
            (self._positions, "<i4"),
        ):
            index.write(np.array(values, dtype=dtype).tobytes())


class ImageStore:
    """The pictures of `PREFIX`, by number, through mmap: safe to share with forked processes."""

    def __init__(self, prefix: Path) -> None:
        """Raises DataError, with the file and its actual and expected bytes, when the index is damaged."""
        path = path_with(prefix, INDEX_SUFFIX)
        try:
            with path.open("rb") as file:
                header = file.read(HEADER.size)
        except OSError as error:
            raise DataError(f"no image index at {path}: {error.strerror}") from error
        if len(header) < HEADER.size or header[:16] != HEADER.pack(MAGIC, VERSION, 0, 0)[:16]:
            raise DataError(f"{path} is no image index of version {VERSION}: it starts with {header[:16].hex(' ')}")
        _, _, num_documents, num_images = HEADER.unpack(header)
        check_size(path, HEADER.size + 8 * (num_documents + 1) + 20 * num_images)
        buffer = np.memmap(path, mode="r")
        at = HEADER.size
        self.first_images = np.frombuffer(buffer, "<i8", num_documents + 1, at)
        """First picture of each document, and one number more: [D + 1]."""
        at += self.first_images.nbytes
        self._offsets = np.frombuffer(buffer, "<i8", num_images, at)
        at += self._offsets.nbytes
        self._sizes, self._shards, positions = np.frombuffer(buffer, "<i4", 3 * num_images, at).reshape(3, num_images)
        self.positions: NDArray[np.int32] = positions
        """Index of each picture's `<image>` among the tokens of its document: [N]."""
        first = self.first_images
        if first[0] != 0 or first[-1] != num_images or np.any(np.diff(first) < 0):
            raise DataError(f"{path} contradicts itself: the pictures of its documents are not {num_images} in all")
        self._prefix = prefix
        self._files: dict[int, mmap.mmap] = {}

    def read(self, image: int) -> bytes:
        """Return the encoded picture `image`. Raises DataError when its shard does not hold it; `locate` says where."""
        shard, offset, size = (int(values[image]) for values in (self._shards, self._offsets, self._sizes))
        try:
            if shard not in self._files:
                with self.shard_path(shard).open("rb") as file:
                    self._files[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"the shard cannot be read: {error}") from error
        data = self._files[shard][offset : offset + size] if min(offset, size) >= 0 else b""
        if len(data) != size or size == 0:
            raise DataError(f"the picture is cut off: the shard has {len(data)} bytes of it, expected {size}")
        return data

    def shard_path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return path_with(self._prefix, shard_suffix(shard))

    def locate(self, image: int) -> str:
        """Return where a person finds the picture `image`: shard, offset and document."""
        document = int(np.searchsorted(self.first_images, image, side="right")) - 1
        shard = self.shard_path(int(self._shards[image]))
        number = image - int(self.first_images[document])
        return f"{shard} at byte {self._offsets[image]} (picture {number} of document {document}, both counted from 0)"
