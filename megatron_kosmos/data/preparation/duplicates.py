"""Exact duplicates of documents and pictures, found by hashes of 128 bits over a whole corpus: the first one stays.

Shape letters: D documents, I pictures, N either of them.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from megatron_kosmos.data.arrays import BoolArray, Uint64Array
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.part import Part
from megatron_kosmos.data.preparation.tables import Table

BUCKETS = 64
"""Hashes are sorted in so many groups, one after the other: sorting all at once takes more memory than they do."""


class Unique:
    """Which documents and pictures of a sequence of parts stay."""

    def __init__(self, parts: Sequence[Part], filters: Filters) -> None:
        """Read the parts' hashes as far as `filters` asks for them. Raises DataError for a damaged part."""
        counts = [(0, 0), *((part.record.documents, part.record.images) for part in parts)]
        self._ends = np.cumsum(np.array(counts, dtype=np.int64), axis=0)
        num_documents, num_images = map(int, self._ends[-1])
        self._documents, self._images = np.ones(num_documents, np.bool_), np.ones(num_images, np.bool_)
        self.filtered, self.dropped_images = Counter[str](), Counter[str]()
        """Documents and pictures that go, by what drops them."""
        if filters.drop_duplicate_documents:
            hashes = _hashes(parts, num_documents, lambda part: part.tables().documents)
            self._documents = first_occurrences(hashes, self._documents)
            self.filtered["duplicate_document"] = num_documents - int(self._documents.sum())
            self._drop_images_of_dropped(parts)
        if filters.drop_duplicate_images:
            num_candidates = int(self._images.sum())
            hashes = _hashes(parts, num_images, lambda part: part.tables().images)
            self._images = first_occurrences(hashes, self._images)
            self.dropped_images["duplicate_image"] = num_candidates - int(self._images.sum())
            self._drop_documents_without_images(parts)

    def of(self, part: int) -> tuple[BoolArray, BoolArray]:
        """Return which documents [D] and pictures [I] of a part stay: views. None of a dropped document does."""
        (document, image), (documents_end, images_end) = self._ends[part : part + 2]
        return self._documents[document:documents_end], self._images[image:images_end]

    def _drop_images_of_dropped(self, parts: Sequence[Part]) -> None:
        for number, part in enumerate(parts):
            documents, images = self.of(number)
            images &= np.repeat(documents, part.tables().documents["images"])

    def _drop_documents_without_images(self, parts: Sequence[Part]) -> None:
        for number, part in enumerate(parts):
            documents, images = self.of(number)
            tables = part.tables()
            left = np.bincount(tables.document_of_images()[images], minlength=len(documents))
            emptied = documents & (tables.documents["images"] > 0) & (left == 0)
            documents &= ~emptied
            self.filtered["no_images_left"] += int(emptied.sum())


def first_occurrences(hashes: Uint64Array, among: BoolArray) -> BoolArray:
    """Return whether each of `hashes` [N, 2] is the first of its kind among those that `among` [N] admits: [N]."""
    first = np.zeros(len(hashes), dtype=np.bool_)
    buckets = hashes[:, 0].astype(np.uint8) % BUCKETS  # of the lowest byte: without a copy of the column
    for bucket in range(BUCKETS):
        rows = np.flatnonzero((buckets == bucket) & among)
        rows = rows[np.lexsort(hashes[rows].T)]  # stable: equal hashes stay in the order of the corpus
        ordered = hashes[rows]
        is_new = np.ones(len(rows), dtype=np.bool_)
        is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        first[rows[is_new]] = True
    return first


def _hashes(parts: Sequence[Part], num_rows: int, table: Callable[[Part], Table]) -> Uint64Array:
    hashes = np.empty((num_rows, 2), dtype=np.uint64)
    at = 0
    for part in parts:
        rows = table(part)["hash"]
        hashes[at : at + len(rows)] = rows
        at += len(rows)
    return hashes
