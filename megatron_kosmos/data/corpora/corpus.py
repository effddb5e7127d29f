"""A prepared corpus, opened for reading: tokens, pictures and the cheap metadata that packing plans with."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.config.data import CorpusConfig, DataConfig
from megatron_kosmos.data.arrays import Int32Array, Int64Array
from megatron_kosmos.data.corpora.image_store import INDEX_SUFFIX, ImageStore
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import SUFFIX, path_with, read_manifest
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

CHUNK = 1 << 20
"""Documents that are looked at at a time where all of them are, so that it takes no memory to speak of."""


class Corpus:
    """Documents of one kind, `<s> … </s>`, each picture a pair `<image> </image>`."""

    def __init__(self, config: CorpusConfig, tokenizer: KosmosTokenizer) -> None:
        """Open the files at `config.prefix`. Raises DataError when they are damaged, of another kind or tokenizer."""
        self.prefix: Path = config.prefix
        self.kind: SourceKind = config.kind
        self.manifest = read_manifest(config.prefix)
        self._tokenizer = tokenizer
        if self.manifest.kind != config.kind:
            raise DataError(
                f"{config.prefix} holds {self.manifest.kind} documents; the configuration says kind: {config.kind}"
            )
        fingerprint = self.manifest.tokenizer_fingerprint
        if fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{config.prefix} was prepared with another tokenizer (fingerprint {fingerprint[:12]}…) "
                f"than the configured one ({tokenizer.fingerprint[:12]}…); "
                f"prepare it again or set data.tokenizer to the tokenizer that it was prepared with"
            )
        self._documents = IndexedReader(config.prefix)
        self.lengths: Int32Array = self._documents.lengths
        """Tokens of each document on disk: [D]."""
        self.images = self._open_images()
        self._compare_with_manifest()

    def _open_images(self) -> ImageStore | None:
        """Return the pictures, None where the corpus has none. Raises DataError."""
        if path_with(self.prefix, INDEX_SUFFIX).name not in self.manifest.files:
            return None
        images = ImageStore(self.prefix)
        if len(images.first_images) != len(self._documents) + 1:
            raise DataError(
                f"{self.prefix}: the image index has {len(images.first_images) - 1} documents, "
                f"the token index {len(self._documents)}; prepare it again"
            )
        images.check_positions(self.lengths)
        return images if images.num_images else None

    def _compare_with_manifest(self) -> None:
        """Raise DataError unless the manifest counts what the indexes hold."""
        images = self.images
        for name, recorded, actual in (
            ("documents", self.manifest.documents, len(self)),
            ("tokens", self.manifest.tokens, self._documents.num_tokens),
            ("images", self.manifest.images, images.num_images if images else 0),
            (
                "max_images_per_document",
                self.manifest.max_images_per_document,
                images.max_images_per_document if images else 0,
            ),
        ):
            if recorded != actual:
                raise DataError(
                    f"{path_with(self.prefix, SUFFIX)} says {name}: {recorded}, the indexes hold {actual}; "
                    f"prepare the corpus again"
                )

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents)

    @property
    def max_images(self) -> int:
        """Pictures of the document with the most."""
        if self.images is None:
            return 0
        first = self.images.first_images
        return max(int(np.diff(first[start : start + CHUNK + 1]).max()) for start in range(0, len(self), CHUNK))

    @property
    def num_images(self) -> Int64Array:
        """Pictures of each document: [D]."""
        if self.images is None:
            return np.zeros(len(self), dtype=np.int64)
        return np.diff(self.images.first_images)

    def tokens(self, document: int) -> NDArray[Any]:
        """Return a document's tokens, a view of the file.

        Raises DataError for ids that the tokenizer does not have, and when the `<image>` tokens are not where the image
        index says.
        """
        tokens = self._documents[document]
        if not 0 <= tokens.min() <= tokens.max() < self._tokenizer.vocab_size:
            raise DataError(
                f"{path_with(self.prefix, '.bin')} is damaged: document {document} has ids outside of the vocabulary "
                f"of {self._tokenizer.vocab_size}; copy or prepare the corpus again"
            )
        if self.images is not None:
            found = np.flatnonzero(tokens == self._tokenizer.image_id)
            if not np.array_equal(found, self.image_positions(document)):
                raise self._contradiction(document)
        return tokens

    def images_of(self, document: int) -> range:
        """Return the numbers of a document's pictures."""
        if self.images is None:
            return range(0)
        first = self.images.first_images
        return range(int(first[document]), int(first[document + 1]))

    def image_positions(self, document: int) -> Int64Array:
        """Return where the image index says that the `<image>` tokens of a document are; reads no token.

        Raises DataError for places where no pair of `<image>` and `</image>` can be.
        """
        numbers = self.images_of(document)
        if self.images is None or len(numbers) == 0:
            return np.zeros(0, dtype=np.int64)
        positions = self.images.positions[numbers.start : numbers.stop].astype(np.int64)
        places = np.concatenate(([-1], positions, [int(self.lengths[document])]))
        if np.any(np.diff(places) < 2):
            raise self._contradiction(document)
        return positions

    def _contradiction(self, document: int) -> DataError:
        return DataError(
            f"{self.prefix}: the <image> tokens of document {document} are not where the image index says; "
            f"prepare the corpus again"
        )


def data_fingerprint(data: DataConfig) -> str:
    """Return the sha256 (hexadecimal) of all that the order and content of training batches depend on but the seed.

    That is: the files' contents by the checksums in their manifests, kinds, weights, epochs and held-out fractions in
    their order, the tokenizer, the sequence length, the packing, the augmentation. Where the files lie, worker
    processes and held-out corpora don't matter, nor do skipped steps, which may change behind the step that a run is
    at. Raises DataError.
    """
    digest = hashlib.sha256()
    tokenizer = KosmosTokenizer.load(data.tokenizer)
    digest.update(f"{tokenizer.fingerprint} {data.sequence_length}\n".encode())
    # What is as it was before there was a choice is left out: checkpoints recorded the fingerprint without.
    if data.packing != "concatenate":
        digest.update(f"packing {data.packing}\n".encode())
    if data.augmentation is not None:
        digest.update(f"augmentation {data.augmentation.model_dump_json()}\n".encode())
    for corpus in data.train:
        manifest = read_manifest(corpus.prefix)
        checksums = sorted(record.sha256 for record in manifest.files.values())
        digest.update(f"{corpus.kind} {corpus.weight!r} {' '.join(checksums)}\n".encode())
        if corpus.epochs is not None or corpus.heldout_fraction is not None:
            digest.update(f"epochs {corpus.epochs} held out {corpus.heldout_fraction!r}\n".encode())
    return digest.hexdigest()
