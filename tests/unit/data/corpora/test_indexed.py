"""Our indexed binaries are Megatron's byte for byte; damaged ones are refused with the bytes that are wrong."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_kosmos.data.corpora.hashed_file import HashedFile
from megatron_kosmos.data.corpora.indexed import HEADER, IndexedReader, token_dtype, write_index
from megatron_kosmos.data.corpora.manifest import path_with
from megatron_kosmos.data.errors import DataError

DOCUMENTS = [[1, 7, 9, 2], [1, 2], [1, *range(100, 400), 2]]


def write(prefix: Path, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    path_with(prefix, ".bin").write_bytes(np.concatenate(DOCUMENTS).astype(dtype).tobytes())
    pieces = [np.array([4, 2], dtype="<i4"), np.zeros(0, dtype="<i4"), np.array([302], dtype="<i4")]
    index = HashedFile(path_with(prefix, ".idx"))
    write_index(index, dtype, 3, lambda: pieces)
    index.close()


@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_files_equal_those_of_megatron(tmp_path: Path, vocab_size: int) -> None:
    write(tmp_path / "ours", vocab_size)
    dtype = token_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert dtype.itemsize == (2 if vocab_size == 65_499 else 4)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    assert [document.tolist() for document in IndexedDataset(str(tmp_path / "ours"))] == DOCUMENTS


def test_reading_back(tmp_path: Path) -> None:
    write(tmp_path / "a", 1000)
    reader = IndexedReader(tmp_path / "a")
    assert len(reader) == 3
    assert reader.lengths.tolist() == [4, 2, 302]
    assert [reader[number].tolist() for number in range(3)] == DOCUMENTS


def damage_header(**fields: int | bytes) -> Callable[[bytes], bytes]:
    """Returns a function that changes fields of an index's header."""
    names = ("magic", "version", "code", "sequences", "boundaries")

    def change(index: bytes) -> bytes:
        values = dict(zip(names, HEADER.unpack(index[: HEADER.size]), strict=True)) | fields
        return HEADER.pack(*values.values()) + index[HEADER.size :]

    return change


def damage_at(offset: int, value: int) -> Callable[[bytes], bytes]:
    """Returns a function that overwrites an i32 of an index."""
    return lambda index: index[:offset] + struct.pack("<i", value) + index[offset + 4 :]


@pytest.mark.parametrize(
    "suffix, change, message",
    [
        (".bin", lambda data: data[:-2], "a.bin is truncated: 614 bytes, expected 616"),
        (".bin", lambda data: data + b"x", "a.bin is longer than it was: 617 bytes, expected 616"),
        (".idx", lambda data: data[:-1], "a.idx is truncated: 101 bytes, expected 102"),
        (".idx", lambda data: data[:20], "a.idx is truncated: 20 bytes, expected at least 34"),
        (".idx", lambda data: b"", "a.idx is truncated: 0 bytes, expected at least 34"),
        (".idx", damage_header(magic=b"PK\x03\x04"), "a.idx is no indexed dataset of version 1: it starts with 50 4b"),
        (".idx", damage_header(version=2), "a.idx is no indexed dataset of version 1"),
        (".idx", damage_header(code=7), "a.idx holds tokens of type 7; types are 4 (int32) and 8 (uint16)"),
        (".idx", damage_header(sequences=0, boundaries=1), "a.idx holds 0 sequences"),
        (".idx", damage_header(boundaries=2), "a.idx holds 3 sequences and 2 document boundaries"),
        (".idx", damage_header(sequences=1 << 60, boundaries=(1 << 60) + 1), "a.idx is truncated: 102 bytes, expected"),
        (".idx", damage_at(34, 5), "a.idx contradicts itself"),
        (".idx", damage_at(34, -4), "a.idx contradicts itself"),
        (".idx", damage_at(34 + 8, 303), "a.bin is truncated: 616 bytes, expected 618"),
        (".idx", damage_at(34 + 12 + 8, 1 << 30), "a.idx contradicts itself"),
        (".idx", damage_at(34 + 36 + 8, 7), "a.idx contradicts itself"),
    ],
)
def test_damaged_files(tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], message: str) -> None:
    write(tmp_path / "a", 1000)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(message)):
        IndexedReader(tmp_path / "a")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index at .*a\.idx"):
        IndexedReader(tmp_path / "a")
    write(tmp_path / "a", 1000)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin is missing"):
        IndexedReader(tmp_path / "a")
