"""The tables of a part: a row for each of its documents and for each of their pictures, on disk as in memory.

Shape letters: D documents, I pictures, T tokens.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.data.arrays import BoolArray, Int64Array, Uint64Array

HASH_BYTES = 16
DOCUMENT = np.dtype([("tokens", "<i4"), ("images", "<i4"), ("hash", "<u8", 2)])
"""Tokens and pictures of a document, and `EncodedChunk.hashes`: 24 bytes."""
IMAGE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("tar", "<i4"), ("position", "<i4"), ("hash", "<u8", 2)])
"""Where a picture's bytes lie in which tar, the index of its `<image>` in its document, and their hash: 36 bytes."""

Table = NDArray[Any]
"""Rows of DOCUMENT or IMAGE."""


def content_digest(*pieces: bytes) -> bytes:
    """Return a hash of 128 bits of `pieces` one behind the other: equal contents and no others have equal hashes."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def hash_column(digests: Iterable[bytes]) -> Uint64Array:
    """Return hashes as the tables have them: [N, 2]."""
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


@dataclass(frozen=True)
class Tables:
    """The documents [D] of a stretch of a corpus and their pictures [I], in order."""

    documents: Table
    images: Table

    def document_of_images(self) -> Int64Array:
        """Return the number of each picture's document: [I]."""
        return np.repeat(np.arange(len(self.documents)), self.documents["images"])

    def only(self, documents: BoolArray, images: BoolArray) -> "Tables":
        """Return the tables without some documents [D] and pictures [I], as if these had never been there.

        No picture may stay whose document goes.
        """
        if documents.all() and images.all():
            return Tables(self.documents, self.images.copy())
        document_of, cut = self.document_of_images(), ~images
        cut_in_document = np.bincount(document_of[cut], minlength=len(self.documents))
        cut_before_document = np.cumsum(cut_in_document) - cut_in_document
        kept_documents, kept_images = self.documents.copy(), self.images.copy()
        kept_documents["tokens"] -= 2 * cut_in_document
        kept_documents["images"] -= cut_in_document
        kept_images["position"] -= 2 * (np.cumsum(cut) - cut_before_document[document_of])
        return Tables(kept_documents[documents], kept_images[images])

    def tokens_of_only(self, documents: BoolArray, images: BoolArray) -> BoolArray:
        """Return which tokens stay where only some documents [D] and pictures [I] do: [T]."""
        lengths = self.documents["tokens"].astype(np.int64)
        kept = np.repeat(documents, lengths)
        pairs = (np.cumsum(lengths) - lengths)[self.document_of_images()] + self.images["position"]
        for token in (pairs[~images], pairs[~images] + 1):  # <image> and </image>
            kept[token] = False
        return kept
