"""Encoding documents: `<s> … </s>` with each picture as the pair `<image> </image>`, filtered and checked.

The pair has no slots on disk: how many embeddings stand for a picture is the model's business (`packing` opens it).
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_kosmos.data.decoding import decode_image, extension, open_image
from megatron_kosmos.data.documents import Document, ImageReference, parse_record
from megatron_kosmos.data.errors import BadDocument, DataError, LeftOut, MissingImage
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.indexed import token_dtype
from megatron_kosmos.data.input_format import USUAL, InputFormat
from megatron_kosmos.data.readers.records import RawRecord
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.tables import content_digest
from megatron_kosmos.data.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind


@dataclass(frozen=True)
class EncodedImage:
    """A checked picture, in its own encoding."""

    data: bytes
    extension: str
    position: int
    """Index of its `<image>` among the document's tokens."""
    digest: bytes = field(init=False)
    """Hash of its bytes, for finding duplicates."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", content_digest(self.data))


@dataclass(frozen=True)
class EncodedDocument:
    """What goes to disk."""

    tokens: NDArray[Any]
    """Of the type that `indexed.token_dtype` gives the vocabulary."""
    images: list[EncodedImage]
    digest: bytes = field(init=False)
    """Hash of its tokens and pictures, for finding duplicates."""

    def __post_init__(self) -> None:
        content = (self.tokens.tobytes(), *(image.digest for image in self.images))
        object.__setattr__(self, "digest", content_digest(*content))


@dataclass
class EncodedChunk:
    """The documents of a chunk of records, and an account of everything that was left out."""

    documents: list[EncodedDocument] = field(default_factory=list)
    bad: list[BadDocument] = field(default_factory=list)
    """Documents that cannot be used, in order."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Documents that a filter dropped, by filter, or that their source marks as empty."""
    dropped_images: Counter[str] = field(default_factory=Counter)
    """Pictures that a filter dropped, by filter or by what was wrong with them."""


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder is made from; small, so that it travels to worker processes with each chunk."""

    kind: SourceKind
    tokenizer: Path
    filters: Filters
    row_format: RowFormat
    input_format: InputFormat = USUAL


class Encoder:
    """Turns raw records of one kind into tokens and checked pictures."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.kind, self.filters, self.row_format = settings.kind, settings.filters, settings.row_format
        self.input_format = settings.input_format
        self.tokenizer = KosmosTokenizer.load(settings.tokenizer)
        self._dtype = token_dtype(self.tokenizer.vocab_size)

    def encode_chunk(self, records: Sequence[RawRecord]) -> EncodedChunk:
        """Return `records` encoded in order; bad ones are accounted for, not raised."""
        chunk = EncodedChunk()
        for record in records:
            try:
                encoded = self.encode(parse_record(self.kind, record, self.input_format), chunk)
            except BadDocument as problem:
                problem.excerpt = record.excerpt
                chunk.bad.append(problem)
            except LeftOut as left_out:
                chunk.filtered[left_out.reason] += 1
            else:
                if encoded is not None:
                    chunk.documents.append(encoded)
        return chunk

    def encode(self, document: Document, chunk: EncodedChunk) -> EncodedDocument | None:
        """Return `document` encoded, or None if a filter dropped it, which `chunk` then counts. Raises BadDocument."""
        tokens, images = [self.tokenizer.bos_id], list[EncodedImage]()
        content = hashlib.sha256()
        for part in document.parts:
            if isinstance(part, str):
                content.update(part.encode())
                tokens += self.tokenizer.encode(part)
                continue
            try:
                data = _read(part, document.origin)
                image, suffix = _decode(part, data, document.origin)
            except BadDocument as unusable:
                if not self.filters.drop_unusable_images:
                    raise
                chunk.dropped_images[unusable.reason] += 1
                continue
            dropped = self._reason_to_drop(image, len(images))
            if dropped is not None:
                chunk.dropped_images[dropped] += 1
                continue
            content.update(data)
            images.append(EncodedImage(data, suffix, len(tokens)))
            tokens += [self.tokenizer.image_id, self.tokenizer.end_of_image_id]
        tokens.append(self.tokenizer.eos_id)
        had_images = any(isinstance(part, ImageReference) for part in document.parts)
        if had_images and not images:
            chunk.filtered["no_images_left"] += 1
            return None
        if self.filters.halve_single_image and len(images) == 1 and content.digest()[0] % 2:
            chunk.filtered["halve_single_image"] += 1
            return None
        problem = self.row_format.problem(len(images))
        if problem is not None:
            raise BadDocument(document.origin, "too_many_images", problem)
        return EncodedDocument(np.array(tokens, dtype=self._dtype), images)

    def _reason_to_drop(self, image: Image.Image, num_kept: int) -> str | None:
        filters = self.filters
        if filters.max_images is not None and num_kept >= filters.max_images:
            return "max_images"
        if filters.min_image_side is not None and min(image.size) < filters.min_image_side:
            return "min_image_side"
        if filters.drop_single_colour and len(image.getcolors(1) or ()) == 1:
            return "drop_single_colour"
        return None


def _read(reference: ImageReference, origin: str) -> bytes:
    try:
        return reference.read()
    except MissingImage as error:
        raise BadDocument(origin, error.reason, error.detail) from error


def _decode(reference: ImageReference, data: bytes, origin: str) -> tuple[Image.Image, str]:
    """Return the decoded picture, as training will need it, and the usual extension of its format."""
    try:
        return decode_image(data), extension(open_image(data))
    except DataError as error:
        raise BadDocument(origin, "undecodable_image", f"{reference.name}: {error}") from error
