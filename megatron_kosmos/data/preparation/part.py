"""A part of a corpus that is being prepared: a folder with its tokens, tables, pictures, bad records and account."""

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, ValidationError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.data.corpora.hashed_file import HashedFile, fsync_folder, told_when_full
from megatron_kosmos.data.corpora.manifest import FileRecord, as_file, check_size
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.preparation.encoding import EncodedChunk
from megatron_kosmos.data.preparation.image_writing import ImageTarWriter
from megatron_kosmos.data.preparation.tables import DOCUMENT, IMAGE, Tables, hash_column

TOKENS, DOCUMENTS, IMAGES, QUARANTINE = "tokens.bin", "documents.table", "images.table", "quarantine.jsonl"
RECORD = "part.json"
BLOCK_TOKENS = 4 << 20
"""Tokens that are read at once, or one document."""


class PartRecord(StrictModel):
    """The account of a part: fields as those of a manifest."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    images: NonNegativeInt
    skipped: dict[str, NonNegativeInt]
    filtered: dict[str, NonNegativeInt]
    dropped_images: dict[str, NonNegativeInt]
    tars: tuple[str, ...]
    """Files of pictures, in order."""
    files: dict[str, FileRecord]


class PartWriter:
    """Writes the folder of a part. Leaving the block without `finish` deletes it."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any], max_shard_bytes: int) -> None:
        """Make `folder` for part `number`, with tokens of type `dtype`."""
        self._folder, self._dtype = folder, dtype
        with told_when_full(folder):
            folder.mkdir()
        self._files: dict[str, HashedFile] = {}
        self._tokens, self._documents, self._images, self._quarantine = (
            self._open(name) for name in (TOKENS, DOCUMENTS, IMAGES, QUARANTINE)
        )
        self._tars = ImageTarWriter(self._open, f"{number:06d}", max_shard_bytes)
        self._num_documents = self._num_images = 0
        self._skipped, self._filtered, self._dropped_images = Counter[str](), Counter[str](), Counter[str]()

    def append(self, chunk: EncodedChunk) -> None:
        """Write the next documents. Raises ValueError for tokens of another type, DataError when the disk is full."""
        for problem in chunk.bad:
            self._quarantine.write(_quarantined(problem))
        self._skipped.update(problem.reason for problem in chunk.bad)
        self._filtered += chunk.filtered
        self._dropped_images += chunk.dropped_images
        if chunk.tokens.dtype != self._dtype:
            raise ValueError(f"tokens are {chunk.tokens.dtype}, the file holds {self._dtype}")
        self._tokens.write(chunk.tokens.tobytes())
        self._append_rows(chunk)

    def _append_rows(self, chunk: EncodedChunk) -> None:
        rows = np.zeros(chunk.num_documents, DOCUMENT)
        rows["tokens"], rows["hash"] = chunk.lengths, chunk.hashes
        if chunk.images:
            rows["images"] = [len(images) for images in chunk.images]
        self._documents.write(rows.tobytes())
        images = [image for of_document in chunk.images for image in of_document]
        places = array("q")
        for number, of_document in enumerate(chunk.images, start=self._num_documents):
            places.extend(self._tars.append(number, of_document))
        self._num_documents += chunk.num_documents
        rows = np.zeros(len(images), IMAGE)
        rows["tar"], rows["offset"] = np.array(places, dtype=np.int64).reshape(-1, 2).T
        rows["size"] = [len(image.data) for image in images]
        rows["position"] = [image.position for image in images]
        rows["hash"] = hash_column(image.digest for image in images)
        self._images.write(rows.tobytes())
        self._num_images += len(images)

    def finish(self) -> None:
        """Bring everything to disk. Raises DataError when that is full."""
        tars = self._tars.finish()
        record = PartRecord(
            documents=self._num_documents,
            tokens=self._tokens.num_bytes // self._dtype.itemsize,
            images=self._num_images,
            skipped=self._skipped,
            filtered=self._filtered,
            dropped_images=self._dropped_images,
            tars=tars,
            files={name: file.close() for name, file in self._files.items()},
        )
        account = self._open(RECORD)
        account.write(as_file(record))
        account.close()
        self._files.clear()
        fsync_folder(self._folder)

    def _open(self, name: str) -> HashedFile:
        self._files[name] = HashedFile(self._folder / name)
        return self._files[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()
        if kind is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Part:
    """A finished part."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError unless all of it is there, as far as sizes tell."""
        self.folder, self.record = folder, read_record(folder)
        for name, file in self.record.files.items():
            check_size(folder / name, file.bytes)

    def tables(self) -> Tables:
        """Return the rows of its documents and pictures. Raises DataError when they are damaged."""
        return Tables(np.frombuffer(self._read(DOCUMENTS), DOCUMENT), np.frombuffer(self._read(IMAGES), IMAGE))

    def quarantine(self) -> bytes:
        """Return its lines of bad records. Raises DataError when they are damaged."""
        return self._read(QUARANTINE)

    def first_bad(self) -> BadDocument | None:
        """Return its first bad record. Raises DataError when the list of them is damaged."""
        if not self.record.skipped:
            return None
        return read_quarantined(self.quarantine().split(b"\n", 1)[0])

    def blocks(self, dtype: np.dtype[Any]) -> Iterator[tuple[slice, slice, NDArray[Any]]]:
        """Yield documents, their pictures, and their tokens, some at a time. Raises DataError when they are damaged."""
        documents = self.tables().documents
        ends = np.cumsum(documents["tokens"], dtype=np.int64)
        image_ends = np.concatenate([[0], np.cumsum(documents["images"], dtype=np.int64)])
        digest, begin = hashlib.sha256(), 0
        with (self.folder / TOKENS).open("rb") as file:
            while begin < len(documents):
                read = int(ends[begin - 1]) if begin else 0
                end = max(begin + 1, int(np.searchsorted(ends, read + BLOCK_TOKENS, side="right")))
                data = file.read((int(ends[end - 1]) - read) * dtype.itemsize)
                digest.update(data)
                yield (
                    slice(begin, end),
                    slice(int(image_ends[begin]), int(image_ends[end])),
                    np.frombuffer(data, dtype),
                )
                begin = end
        self._compare(TOKENS, digest.hexdigest())

    def _read(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def _compare(self, name: str, sha256: str) -> None:
        if sha256 != self.record.files[name].sha256:
            raise DataError(
                f"{self.folder / name} is damaged: it has another sha256 than when it was written; "
                f"delete the folder {self.folder} and run the same command again"
            )


def read_record(folder: Path) -> PartRecord:
    """Return the account of a part. Raises DataError when it is missing or damaged."""
    try:
        return PartRecord.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder / RECORD} cannot be used: {str(error).splitlines()[0]}") from error


def _quarantined(problem: BadDocument) -> bytes:
    """Return a bad record as a line."""
    entry = {"origin": problem.origin, "reason": problem.reason, "detail": problem.detail, "record": problem.excerpt}
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_quarantined(line: bytes) -> BadDocument:
    """Return the bad record of a line."""
    entry = json.loads(line)
    return BadDocument(entry["origin"], entry["reason"], entry["detail"])
