"""Held-out documents of a corpus, chosen by a hash of their tokens: the same text is on the same side in every corpus.

To hash takes half a minute for ten million documents, so one process does and writes `KEY.split` beside the plans of
the run: the numbers D of all documents and H of held-out ones, the held-out documents, and the others.
"""

import hashlib
import logging
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_kosmos.config.data import CorpusConfig, DataConfig
from megatron_kosmos.data.arrays import Int64Array, Uint64Array
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import Manifest, read_manifest
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.hashing import mix_all
from megatron_kosmos.data.shared_files import locked, read_arrays, write_arrays

logger = logging.getLogger(__name__)

Side = Literal["train", "heldout"]

FORMAT = 1
"""To be raised with any change of the files or of the hash: splits of another format are not looked at."""
HASHED_TOKENS = 64
"""The hash is of a document's length and of so many tokens at its beginning. Equal documents have equal hashes, and the
corpus need not be read as a whole."""
CHUNK = 1 << 13
"""Documents that are hashed at a time."""


def documents_of(corpus: Corpus, config: CorpusConfig, side: Side, folder: Path | None = None) -> Int64Array | None:
    """Return the documents that `config` means when it stands in `data.train` or `data.heldout`, sorted; None for all.

    Reads the beginning of every document, unless another process has left the split in `folder`. Raises DataError when
    no documents are left.
    """
    if config.heldout_fraction is None:
        return None
    heldout, train = _split(corpus, config.heldout_fraction, folder)
    documents = heldout if side == "heldout" else train
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


def _split(corpus: Corpus, fraction: float, folder: Path | None) -> tuple[Int64Array, Int64Array]:
    """Return the held-out documents and the others: what is in `folder`, or what others then find there."""
    if folder is None:
        return _hash_and_split(corpus, fraction)
    checksums = sorted(record.sha256 for record in corpus.manifest.files.values())
    key = hashlib.sha256(repr((FORMAT, HASHED_TOKENS, fraction, checksums)).encode()).hexdigest()[:16]
    path = folder / f"{key}.split"
    with locked(folder / f"{key}.lock"):
        sides = _read(path, len(corpus))
        if sides is not None:
            return sides
        heldout, train = _hash_and_split(corpus, fraction)
        try:
            write_arrays(path, [np.array([len(corpus), len(heldout)]), heldout, train])
        except OSError as error:
            logger.warning(
                "every process hashes the documents of %s: %s cannot be written: %s", corpus.prefix, path, error
            )
    return _read(path, len(corpus)) or (heldout, train)


def _read(path: Path, num_documents: int) -> tuple[Int64Array, Int64Array] | None:
    """Return the sides in a file, through mmap; None where there is none, or it is damaged."""
    content = read_arrays(path)
    if content is None or len(content) != 2 + num_documents or content[0] != num_documents:
        return None
    heldout, train = np.split(content[2:], [int(content[1])])
    return heldout, train


def _hash_and_split(corpus: Corpus, fraction: float) -> tuple[Int64Array, Int64Array]:
    """Return the documents whose hash is in the lowest `fraction`, and the others."""
    reader = IndexedReader(corpus.prefix)
    limit = np.uint64(int(fraction * 2**64))
    is_heldout = np.zeros(len(reader), dtype=np.bool_)
    for first in range(0, len(reader), CHUNK):
        stop = min(first + CHUNK, len(reader))
        is_heldout[first:stop] = _hashes(reader, first, stop) < limit
    return np.flatnonzero(is_heldout), np.flatnonzero(~is_heldout)


def _hashes(reader: IndexedReader, first: int, stop: int) -> Uint64Array:
    lengths = reader.lengths[first:stop]
    tokens = reader.beginnings(first, stop, min(HASHED_TOKENS, int(lengths.max()))).astype(np.uint64, order="F")
    hashes = mix_all(lengths.astype(np.uint64))
    for column in range(tokens.shape[1]):
        hashes = np.where(lengths > column, mix_all(hashes ^ tokens[:, column]), hashes)
    return hashes
