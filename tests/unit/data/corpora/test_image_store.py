"""Pictures come back by number as they went in; the shards are plain webdataset tars; damage is named."""

import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_kosmos.data.corpora.hashed_file import HashedFile
from megatron_kosmos.data.corpora.image_store import HEADER, ImageStore
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.preparation.encoding import EncodedImage
from megatron_kosmos.data.preparation.image_writing import ImageTarWriter, write_image_index
from megatron_kosmos.data.preparation.tables import DOCUMENT, IMAGE, Tables

DOCUMENTS = [[b"first" * 300, b"second"], [], [b"third" * 5000], [b"fourth", b"fifth", b"sixth"]]
PICTURES = [picture for document in DOCUMENTS for picture in document]


def write(prefix: Path, max_shard_bytes: int = 1 << 30) -> None:
    """Write DOCUMENTS, as a part and the index of a corpus that consists of it."""
    files: list[HashedFile] = []

    def open_file(name: str) -> HashedFile:
        files.append(HashedFile(prefix.with_name(f"{prefix.name}{name}")))
        return files[-1]

    tars = ImageTarWriter(lambda name: open_file(f"-{name}"), "000007", max_shard_bytes)
    rows: list[tuple[int, ...]] = []
    for document, contents in enumerate(DOCUMENTS):
        images = [EncodedImage(data, "png", 1 + 3 * number) for number, data in enumerate(contents)]
        places = iter(tars.append(document, images))
        rows += [(*reversed((next(places), next(places))), len(i.data), i.position) for i in images]
    tars.finish()
    tables = Tables(np.zeros(len(DOCUMENTS), DOCUMENT), np.zeros(len(rows), IMAGE))
    tables.documents["images"] = [len(document) for document in DOCUMENTS]
    for column, values in zip(("offset", "tar", "size", "position"), zip(*rows, strict=True), strict=True):
        tables.images[column] = values
    halves = [Tables(tables.documents[:1], tables.images[:2]), Tables(tables.documents[1:], tables.images[2:])]
    write_image_index(open_file(".images.idx"), 4, 6, lambda: halves)
    for file in files:
        file.close()


@pytest.mark.parametrize("max_shard_bytes, num_shards", [(1 << 30, 1), (20_000, 2), (1, 6)])
def test_pictures_come_back(tmp_path: Path, max_shard_bytes: int, num_shards: int) -> None:
    write(tmp_path / "a", max_shard_bytes)
    assert len(list(tmp_path.glob("a-images-*.tar"))) == num_shards
    store = ImageStore(tmp_path / "a")
    assert [store.read(number) for number in range(6)] == PICTURES
    assert store.first_images.tolist() == [0, 2, 2, 3, 6]
    assert store.positions.tolist() == [1, 4, 1, 1, 4, 7]


def test_shards_are_webdataset_tars(tmp_path: Path) -> None:
    write(tmp_path / "a")
    shard = tmp_path / "a-images-00000.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"000007-{document:09d}" for document in (0, 2, 3)]
    assert [sample[f"{number:04d}.png"] for sample, number in ((samples[0], 1), (samples[2], 2))] == [
        b"second",
        b"sixth",
    ]
    with tarfile.open(shard) as tar:
        assert {member.mtime for member in tar} == {0}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-1], "a.images.idx is truncated: 191 bytes, expected 192"),
        (lambda data: data[:10], "a.images.idx is no image index of version 1"),
        (lambda data: b"OTHER" + data[5:], "a.images.idx is no image index of version 1: it starts with 4f 54"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "a.images.idx is truncated: 192 bytes, expected"),
        (lambda data: data[: HEADER.size] + b"\x01" + data[HEADER.size + 1 :], "a.images.idx contradicts itself"),
        (lambda data: data[: HEADER.size + 8] + b"\x09" + data[HEADER.size + 9 :], "a.images.idx contradicts itself"),
    ],
)
def test_damaged_indexes(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a.images.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(message)):
        ImageStore(tmp_path / "a")


def test_a_truncated_or_missing_shard(tmp_path: Path) -> None:
    write(tmp_path / "a")
    shard = tmp_path / "a-images-00000.tar"
    store = ImageStore(tmp_path / "a")
    content = shard.read_bytes()
    shard.write_bytes(content[:4000])
    assert store.read(1) == b"second"
    with pytest.raises(DataError, match=r"the picture is cut off: the shard has \d+ bytes of it, expected 25000"):
        store.read(2)
    assert store.locate(2) == f"{shard} at byte 3584 (picture 0 of document 2, both counted from 0)"
    with pytest.raises(DataError, match=r"a\.images\.idx contradicts itself: it has pictures outside of their shards"):
        ImageStore(tmp_path / "a")
    shard.write_bytes(content)
    store = ImageStore(tmp_path / "a")
    shard.unlink()
    with pytest.raises(DataError, match=r"the shard cannot be read: .*No such file"):
        store.read(0)
    with pytest.raises(DataError, match=r"a-images-00000\.tar cannot be read: No such file .*a\.images\.idx names it"):
        ImageStore(tmp_path / "a")
    with pytest.raises(DataError, match=r"no image index at .*none\.images\.idx"):
        ImageStore(tmp_path / "none")


@pytest.mark.parametrize("field", [0, 1, 2])
@pytest.mark.parametrize("value", [-1, 2**31 - 1])
def test_an_index_that_points_outside(tmp_path: Path, field: int, value: int) -> None:
    """Offset, size and shard of the first picture: never more than an error."""
    write(tmp_path / "a")
    path = tmp_path / "a.images.idx"
    data = bytearray(path.read_bytes())
    at = HEADER.size + 5 * 8 + (0, 6 * 8, 6 * 8 + 6 * 4)[field]
    width = 8 if field == 0 else 4
    data[at : at + width] = value.to_bytes(width, "little", signed=True)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.images\.idx contradicts itself|a-images-00001\.tar cannot be read"):
        ImageStore(tmp_path / "a")


def test_pairs_end_before_their_document(tmp_path: Path) -> None:
    write(tmp_path / "a")
    store, shortest = ImageStore(tmp_path / "a"), np.array([7, 2, 4, 10], np.int32)  # a pair, then `</s>`
    store.check_positions(shortest)
    for document in (0, 2, 3):
        with pytest.raises(DataError, match=r"a\.images\.idx contradicts itself: pictures lie outside"):
            store.check_positions(shortest - (np.arange(4) == document).astype(np.int32))
