"""Held-out documents of a corpus, chosen by a hash of their tokens: the same text is on the same side in every corpus.

Shape letters: D documents.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_kosmos.config.data import CorpusConfig, DataConfig
from megatron_kosmos.data.corpus import Corpus
from megatron_kosmos.data.cutting import Int64Array
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.hashing import Uint64Array, mix_all
from megatron_kosmos.data.indexed import IndexedReader
from megatron_kosmos.data.manifest import Manifest, read_manifest

Side = Literal["train", "heldout"]

HASHED_TOKENS = 64
"""The hash is of a document's length and of so many tokens at its beginning. Equal documents have equal hashes, and the
corpus need not be read as a whole."""
CHUNK = 1 << 13
"""Documents that are hashed at a time."""


def documents_of(corpus: Corpus, config: CorpusConfig, side: Side) -> Int64Array:
    """Return the documents that `config` means when it stands in `data.train` or `data.heldout`, sorted.

    Reads the beginning of every document once a process. Raises DataError when none are left.
    """
    if config.heldout_fraction is None:
        return np.arange(len(corpus))
    checksum = _tokens_checksum(corpus.manifest)
    heldout = _heldout_documents(corpus.prefix, checksum, config.heldout_fraction)
    documents = heldout if side == "heldout" else np.setdiff1d(np.arange(len(corpus)), heldout, assume_unique=True)
    if len(documents) == 0:
        raise DataError(
            f"{corpus.prefix}: heldout_fraction={config.heldout_fraction} leaves none of its {len(corpus)} documents "
            f"for data.{side}"
        )
    return documents


def refuse_overlap(data: DataConfig) -> None:
    """Raise DataError when a document of `data.heldout` would be trained on.

    Corpora with the same tokens are recognized wherever they lie. Equal documents in corpora that differ are not looked
    for: the same `heldout_fraction` for both keeps them apart.
    """
    trained = [(corpus, _tokens_checksum(read_manifest(corpus.prefix))) for corpus in data.train]
    for heldout in data.heldout:
        checksum = _tokens_checksum(read_manifest(heldout.prefix))
        for corpus in (corpus for corpus, other in trained if other == checksum):
            ours, theirs = heldout.heldout_fraction, corpus.heldout_fraction
            if ours is None or theirs is None or ours > theirs:
                raise DataError(
                    f"documents of data.heldout would be trained on: {heldout.prefix} (heldout_fraction={ours}) holds "
                    f"the same tokens as {corpus.prefix} in data.train (heldout_fraction={theirs}); give both the same "
                    f"heldout_fraction, such as 0.01"
                )


def _tokens_checksum(manifest: Manifest) -> str:
    return next(record.sha256 for name, record in manifest.files.items() if name.endswith(".bin"))


@lru_cache(maxsize=32)  # every evaluation opens its corpora again
def _heldout_documents(prefix: Path, checksum: str, fraction: float) -> Int64Array:
    """Return the documents whose hash is in the lowest `fraction`; `checksum` is the content at `prefix`."""
    reader = IndexedReader(prefix)
    limit = np.uint64(int(fraction * 2**64))
    chunks = range(0, len(reader), CHUNK)
    return np.concatenate(
        [first + np.flatnonzero(_hashes(reader, first, min(first + CHUNK, len(reader))) < limit) for first in chunks]
    )


def _hashes(reader: IndexedReader, first: int, stop: int) -> Uint64Array:
    lengths = reader.lengths[first:stop]
    tokens = reader.beginnings(first, stop, min(HASHED_TOKENS, int(lengths.max()))).astype(np.uint64, order="F")
    hashes = mix_all(lengths.astype(np.uint64))
    for column in range(tokens.shape[1]):
        hashes = np.where(lengths > column, mix_all(hashes ^ tokens[:, column]), hashes)
    return hashes
