"""Preparing a corpus: source documents in, indexed binary, image shards and manifest out.

Records are cut into chunks, worker processes encode chunks, this process writes them in their order: the output does
not depend on the number of workers. Everything is written under temporary names and renamed last.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_kosmos.data.documents import check_input
from megatron_kosmos.data.encoding import EncodedChunk, EncoderSettings
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.image_store import ImageShardWriter
from megatron_kosmos.data.indexed import IndexedWriter, token_dtype
from megatron_kosmos.data.input_format import InputFormat
from megatron_kosmos.data.manifest import (
    SUFFIX,
    Manifest,
    PreparationSettings,
    path_with,
    read_manifest,
    write_manifest,
)
from megatron_kosmos.data.packing_summary import summarize_packing
from megatron_kosmos.data.pool import encode_files
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.staging import Staging
from megatron_kosmos.data.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

SKIPPED_SUFFIX = ".skipped.jsonl"


@dataclass(frozen=True)
class Preparation:
    """A corpus to prepare."""

    kind: SourceKind
    inputs: tuple[Path, ...]
    output: Path
    """PREFIX of the files."""
    tokenizer: Path
    """Folder of a KosmosTokenizer."""
    num_workers: int = 1
    """Processes that encode; 1 encodes in this one."""
    on_bad: Literal["error", "skip"] = "error"
    """Stop at the first document that cannot be used, or list it in `PREFIX.skipped.jsonl` and go on."""
    filters: Filters = field(default_factory=Filters)
    row_format: RowFormat = field(default_factory=RowFormat)
    """What the pictures of one document must fit together."""
    input_format: InputFormat = field(default_factory=InputFormat)
    max_shard_bytes: int = 1 << 30
    """A shard that has as many is followed by another."""
    overwrite: bool = False
    """Replace a corpus that is at `output` already."""


Progress = Callable[[int, int], None]
"""Called as chunks are written, with the input bytes and the documents that they took."""


def prepare(preparation: Preparation, on_progress: Progress = lambda num_bytes, num_documents: None) -> Manifest:
    """Write `PREFIX.bin`, `.idx`, `.manifest.json` and, with pictures, shards and their index; return the manifest.

    Raises BadDocument for the first bad document unless `on_bad` is "skip", and DataError for whatever else is wrong;
    nothing is left behind then.
    """
    for file in preparation.inputs:
        check_input(preparation.kind, file)
    tokenizer = KosmosTokenizer.load(preparation.tokenizer)
    if path_with(preparation.output, SUFFIX).exists() and not preparation.overwrite:
        raise DataError(f"there is a corpus at {preparation.output} already; give --overwrite to replace it")
    settings = EncoderSettings(
        preparation.kind,
        preparation.tokenizer,
        preparation.filters,
        preparation.row_format,
        preparation.input_format,
    )
    with Staging(preparation.output) as staging:
        writer = CorpusWriter(staging, preparation, tokenizer)
        for chunk, num_bytes in encode_files(settings, preparation.inputs, preparation.num_workers):
            writer.append(chunk)
            on_progress(num_bytes, len(chunk.documents))
        return writer.finish()


class CorpusWriter:
    """Takes encoded chunks in order and keeps the account of them."""

    def __init__(self, staging: Staging, preparation: Preparation, tokenizer: KosmosTokenizer) -> None:
        self._staging, self._preparation, self._tokenizer = staging, preparation, tokenizer
        dtype = token_dtype(tokenizer.vocab_size)
        self._documents = IndexedWriter(staging.open(".bin"), staging.open(".idx"), dtype)
        has_images = preparation.kind != "text"
        self._images = ImageShardWriter(staging.open, preparation.max_shard_bytes) if has_images else None
        self._bad: list[BadDocument] = []
        self._filtered, self._dropped_images = Counter[str](), Counter[str]()
        self._max_images = 0

    def append(self, chunk: EncodedChunk) -> None:
        """Write a chunk. Raises BadDocument if it has a bad document and bad documents are errors."""
        if chunk.bad and self._preparation.on_bad == "error":
            raise chunk.bad[0]
        self._bad += chunk.bad
        self._filtered += chunk.filtered
        self._dropped_images += chunk.dropped_images
        for document in chunk.documents:
            self._documents.append(document.tokens)
            self._max_images = max(self._max_images, len(document.images))
            if self._images is not None:
                self._images.append(document.images)

    def finish(self) -> Manifest:
        """Write indexes, list of skipped documents and manifest, and give all files their names."""
        if self._documents.num_documents == 0:
            left_out = dict(Counter(problem.reason for problem in self._bad) + self._filtered)
            raise DataError(
                f"no document left for {self._preparation.output}: {left_out or 'the inputs are empty'}"
                + (f"; the first: {self._bad[0]}" if self._bad else "")
            )
        self._documents.finish()
        if self._images is not None:
            self._images.finish()
        if self._bad:
            skipped = self._staging.open(SKIPPED_SUFFIX)
            for problem in self._bad:
                entry = {"origin": problem.origin, "reason": problem.reason, "detail": problem.detail}
                skipped.write((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        manifest = self._manifest()
        self._staging.open(SUFFIX).write(write_manifest(manifest))
        _delete(self._preparation.output)
        self._staging.commit()
        return manifest

    def _manifest(self) -> Manifest:
        preparation = self._preparation
        places = None if self._images is None else self._images.places
        return Manifest(
            kind=preparation.kind,
            documents=self._documents.num_documents,
            tokens=self._documents.num_tokens,
            images=self._images.num_images if self._images is not None else 0,
            max_images_per_document=self._max_images,
            skipped=dict(sorted(Counter(problem.reason for problem in self._bad).items())),
            filtered=dict(sorted(self._filtered.items())),
            dropped_images=dict(sorted(self._dropped_images.items())),
            packing=summarize_packing(preparation.kind, self._documents.lengths, places, preparation.row_format),
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            sources=tuple(str(file) for file in preparation.inputs),
            settings=PreparationSettings(
                on_bad=preparation.on_bad,
                filters=preparation.filters,
                row_format=preparation.row_format,
                max_shard_bytes=preparation.max_shard_bytes,
                input_format=preparation.input_format,
            ),
            files=self._staging.records(),
        )


def _delete(prefix: Path) -> None:
    """Delete a corpus at `prefix`, its manifest first, so that what is left is not taken for a corpus."""
    manifest_path = path_with(prefix, SUFFIX)
    if not manifest_path.exists():
        return
    try:
        names = list(read_manifest(prefix).files)
    except DataError:
        names = []  # damaged: those of its files that the new corpus has too are overwritten
    manifest_path.unlink()
    for name in names:
        (prefix.parent / name).unlink(missing_ok=True)
