"""The pictures of a corpus: tar shards that webdataset reads too, and an index for random access.

`PREFIX-images-00000.tar` … hold the pictures in order of appearance, as
`<part>-<document of the part>.<picture>.<extension>`; dropped duplicates are in there, but not in the index.
`PREFIX.images.idx`, little-endian, for D documents and N pictures: magic, u64 version, u64 D, u64 N; i64[D + 1] first
picture of each document; i64[N] byte offset in the shard; i32[N] bytes; i32[N] shard; i32[N] index of its `<image>`
among the document's tokens.
"""

import mmap
import struct
import tarfile
from pathlib import Path

import numpy as np

from megatron_kosmos.data.arrays import Int32Array, Int64Array
from megatron_kosmos.data.corpora.manifest import check_size, path_with
from megatron_kosmos.data.errors import DataError

INDEX_SUFFIX = ".images.idx"
MAGIC = b"KOSMIMG\x00"
HEADER = struct.Struct("<8sQQQ")
VERSION = 1
CHUNK = 1 << 18
"""Documents or pictures whose entries are checked at a time."""


def shard_suffix(number: int) -> str:
    """Return the end of the name of a shard."""
    return f"-images-{number:05d}.tar"


class ImageStore:
    """The pictures of `PREFIX`, by number, through mmap: safe to share with forked processes."""

    def __init__(self, prefix: Path) -> None:
        """Raises DataError, with the file, when the index is damaged or a shard does not hold what it says."""
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
        self._offsets: Int64Array = np.frombuffer(buffer, "<i8", num_images, at)
        at += self._offsets.nbytes
        self._sizes, self._shards, positions = np.frombuffer(buffer, "<i4", 3 * num_images, at).reshape(3, num_images)
        self.positions: Int32Array = positions
        """Index of each picture's `<image>` among the tokens of its document: [N]."""
        self._prefix = prefix
        self._files: dict[int, mmap.mmap] = {}
        self.max_images_per_document = self._checked_maximum(path)
        """The most pictures that a document has."""
        self._check_shards(path)

    def _checked_maximum(self, path: Path) -> int:
        """Return the most pictures of a document. Raises DataError when they are not all, in order."""
        first, maximum = self.first_images, 0
        is_whole = bool(first[0] == 0 and first[-1] == len(self._sizes))
        for start in range(0, len(first) - 1, CHUNK):
            part = first[start : start + CHUNK + 1]
            is_whole &= bool(np.all(part[1:] >= part[:-1]))
            maximum = max(maximum, int((part[1:] - part[:-1]).max()))
        if not is_whole:
            raise DataError(
                f"{path} contradicts itself: the pictures of its documents are not {len(self._sizes)} in all"
            )
        return maximum

    def _check_shards(self, path: Path) -> None:
        """Raise DataError unless every picture is one byte or more of a shard that is there."""
        shard_bytes = np.zeros(0, dtype=np.int64)
        for start in range(0, len(self._sizes), CHUNK):
            part = slice(start, start + CHUNK)
            sizes, shards, offsets = self._sizes[part].astype(np.int64), self._shards[part], self._offsets[part]
            lowest, highest = int(shards.min()), int(shards.max())
            while len(shard_bytes) <= highest:  # it ends at the first that is missing
                shard_bytes = np.append(shard_bytes, self._bytes_of_shard(len(shard_bytes), path))
            is_inside = lowest >= 0 and sizes.min() >= 1 and offsets.min() >= 0
            if not is_inside or np.any(offsets > shard_bytes[shards] - sizes) or np.any(offsets % tarfile.BLOCKSIZE):
                raise DataError(f"{path} contradicts itself: it has pictures outside of their shards; prepare it again")

    def _bytes_of_shard(self, shard: int, path: Path) -> int:
        try:
            return self.shard_path(shard).stat().st_size
        except OSError as error:
            raise DataError(f"{self.shard_path(shard)} cannot be read: {error.strerror}; {path} names it") from error

    def check_positions(self, lengths: Int32Array) -> None:
        """Raise DataError unless every picture's two markers lie within its document of so many tokens: [D]."""
        for start in range(0, len(lengths), CHUNK):
            first = self.first_images[start : start + CHUNK + 1]
            document = np.repeat(np.arange(len(first) - 1), first[1:] - first[:-1])
            positions = self.positions[first[0] : first[-1]].astype(np.int64)
            is_inside = (positions >= 1) & (positions + 2 < lengths[start : start + CHUNK][document])
            is_behind = (document[1:] > document[:-1]) | (positions[1:] >= positions[:-1] + 2)
            if not (is_inside.all() and is_behind.all()):
                path = path_with(self._prefix, INDEX_SUFFIX)
                raise DataError(f"{path} contradicts itself: pictures lie outside of their documents; prepare it again")

    @property
    def num_images(self) -> int:
        """Pictures of all documents together."""
        return len(self._sizes)

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
