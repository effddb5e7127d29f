"""Megatron's indexed binary: `.bin` holds the tokens of all documents, `.idx` where each of them lies.

The files are those of megatron.core.datasets.indexed_dataset, byte for byte, with one sequence a document. Written here
because its builder takes one torch tensor a document, and read here because its reader checks next to nothing.
"""

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.data.arrays import Int32Array
from megatron_kosmos.data.corpora.hashed_file import HashedFile
from megatron_kosmos.data.corpora.manifest import check_size, path_with
from megatron_kosmos.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the tokens' type, number of sequences, number of documents + 1."""
VERSION = 1
INT32, UINT16 = np.dtype("<i4"), np.dtype("<u2")
BLOCK = 1 << 20
"""Boundaries of documents that are written at once."""
TYPE_CODES: dict[int, np.dtype[Any]] = {4: INT32, 8: UINT16}
CHUNK = 1 << 18
"""Documents whose entries are checked at a time."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that Megatron chooses for ids below `vocab_size`."""
    return UINT16 if vocab_size < 65_500 else INT32


Lengths = Callable[[], Iterable[NDArray[Any]]]
"""Gives, piece by piece, how many tokens the documents have."""


def write_index(file: HashedFile, dtype: np.dtype[Any], num_documents: int, lengths: Lengths) -> None:
    """Write the `.idx` of documents of tokens of type `dtype`."""
    code = next(code for code, known in TYPE_CODES.items() if known == dtype)
    file.write(HEADER.pack(MAGIC, VERSION, code, num_documents, num_documents + 1))
    for piece in lengths():
        file.write(piece.astype("<i4").tobytes())
    num_tokens = 0
    for piece in lengths():
        ends = num_tokens + np.cumsum(piece, dtype="<i8")
        file.write(((ends - piece) * dtype.itemsize).astype("<i8").tobytes())
        num_tokens = int(ends[-1]) if len(ends) else num_tokens
    for first in range(0, num_documents + 1, BLOCK):
        file.write(np.arange(first, min(first + BLOCK, num_documents + 1), dtype="<i8").tobytes())


class IndexedReader:
    """Documents of `PREFIX.bin` through mmap; every size in `PREFIX.idx` is checked at the start."""

    def __init__(self, prefix: Path) -> None:
        """Raises DataError, with the file and its actual and expected bytes, when the files disagree."""
        idx_path, bin_path = path_with(prefix, ".idx"), path_with(prefix, ".bin")
        self.dtype, num_documents = _read_header(idx_path)
        check_size(idx_path, HEADER.size + 12 * num_documents + 8 * (num_documents + 1))
        buffer = np.memmap(idx_path, mode="r")
        self.lengths: Int32Array = np.frombuffer(buffer, "<i4", num_documents, HEADER.size)
        """Tokens of each document."""
        self._offsets = np.frombuffer(buffer, "<i8", num_documents, HEADER.size + 4 * num_documents)
        documents = np.frombuffer(buffer, "<i8", num_documents + 1, HEADER.size + 12 * num_documents)
        self.num_tokens = self._checked_number_of_tokens(idx_path, documents)
        """Tokens of all documents together."""
        check_size(bin_path, self.num_tokens * self.dtype.itemsize)
        self._tokens = np.memmap(bin_path, dtype=self.dtype, mode="r")

    def _checked_number_of_tokens(self, path: Path, documents: NDArray[Any]) -> int:
        """Return what the lengths come to. Raises DataError when they, offsets and boundaries disagree."""
        num_tokens = 0
        for first in range(0, len(self), CHUNK):
            part = slice(first, min(first + CHUNK, len(self)))
            lengths = self.lengths[part]
            stops = num_tokens + np.cumsum(lengths, dtype=np.int64)
            if (
                lengths.min() < 1
                or not np.array_equal(self._offsets[part], (stops - lengths) * self.dtype.itemsize)
                or not np.array_equal(documents[part], np.arange(part.start, part.stop))
            ):
                raise DataError(
                    f"{path} contradicts itself: lengths, offsets and documents disagree near document {first}; "
                    f"prepare it again"
                )
            num_tokens = int(stops[-1])
        if documents[-1] != len(self):
            raise DataError(f"{path} contradicts itself: it ends with document {documents[-1]}, not {len(self)}")
        return num_tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> NDArray[Any]:
        """Return the tokens of a document, as a view of the file."""
        start = int(self._offsets[document]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.lengths[document])]

    def beginnings(self, first: int, stop: int, length: int) -> NDArray[Any]:
        """Return the first `length` tokens of documents `first` … `stop` - 1, and anything where one has ended."""
        starts = self._offsets[first:stop, None] // self.dtype.itemsize
        return self._tokens[np.minimum(starts + np.arange(length), len(self._tokens) - 1)]


def _index_arrays(lengths: Int32Array, itemsize: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return lengths, byte offsets and document boundaries as the index holds them."""
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    return lengths.astype("<i4"), offsets * itemsize, np.arange(len(lengths) + 1, dtype="<i8")


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """Return the tokens' type and the number of documents. Raises DataError."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise DataError(f"no index at {path}: {error.strerror}") from error
    if len(header) < HEADER.size:
        raise DataError(f"{path} is truncated: {len(header)} bytes, expected at least {HEADER.size}")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{path} is no indexed dataset of version {VERSION}: it starts with {header[:17].hex(' ')}")
    if code not in TYPE_CODES:
        raise DataError(f"{path} holds tokens of type {code}; types are 4 (int32) and 8 (uint16)")
    if num_sequences < 1 or num_boundaries != num_sequences + 1:
        raise DataError(
            f"{path} holds {num_sequences} sequences and {num_boundaries} document boundaries; one sequence a document "
            f"needs at least one sequence and one boundary more"
        )
    return TYPE_CODES[code], num_sequences
