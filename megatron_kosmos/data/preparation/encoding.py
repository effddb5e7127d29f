"""Encoding documents: `<s> … </s>` with each picture as the pair `<image> </image>`, filtered and checked.

The pair has no slots on disk: how many embeddings stand for a picture is the model's business (`packing` opens it).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_kosmos.data.arrays import Int32Array, Int64Array, Uint64Array
from megatron_kosmos.data.corpora.indexed import token_dtype
from megatron_kosmos.data.errors import BadDocument, LeftOut, UnusableImage
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.images.decoding import decode, extension, open_image
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.tables import content_digest, hash_column
from megatron_kosmos.data.preparation.text_filters import TextFilter
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, parse_text, parse_texts
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat
from megatron_kosmos.data.sources.readers.records import RawRecord
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class _CheckedImage:
    """A picture that stays, in its own encoding."""

    data: bytes
    extension: str


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


@dataclass
class EncodedChunk:
    """The documents of a chunk of records, and an account of everything that was left out.

    Shape letters: N documents, T tokens of all of them. In arrays, since chunks come from other processes.
    """

    tokens: NDArray[Any]
    """[T], one document after the other, of the type that `indexed.token_dtype` gives the vocabulary."""
    lengths: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N], tokens of each document."""
    images: list[list[EncodedImage]] = field(default_factory=list)
    """Pictures of each document; of text documents, no list at all."""
    hashes: Uint64Array = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    """[N, 2], of tokens and pictures of each document, for finding duplicates; zeros where they are not looked for."""
    bad: list[BadDocument] = field(default_factory=list)
    """Documents that cannot be used, in order."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Documents that a filter dropped, by filter, or that their source marks as empty."""
    dropped_images: Counter[str] = field(default_factory=Counter)
    """Pictures that a filter dropped, by filter or by what was wrong with them."""

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.lengths)


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
        self._text_filter = TextFilter(settings.filters) if settings.filters.only_for_text() else None

    def encode_chunk(self, records: Sequence[RawRecord]) -> EncodedChunk:
        """Return `records` encoded in order; bad ones are accounted for, not raised."""
        chunk = EncodedChunk(np.zeros(0, self._dtype))
        if self.kind == "text":
            ids, lengths = self.tokenizer.encode_all(list(self._texts(records, chunk)))
        else:
            chosen = list(_chosen(self._choose, records, chunk))
            texts = [part for parts in chosen for part in parts if isinstance(part, str)]
            ids, lengths, chunk.images = self._with_images(chosen, *self.tokenizer.encode_all(texts))
        chunk.tokens, chunk.lengths = self._enclosed(ids, lengths), lengths + 2
        chunk.hashes = np.zeros((chunk.num_documents, 2), np.uint64)
        if self.filters.drop_duplicate_documents:
            chunk.hashes = hash_column(_digests(chunk))
        return chunk

    def _texts(self, records: Sequence[RawRecord], chunk: EncodedChunk) -> Iterator[str]:
        for record in records:
            texts = parse_texts(record, self.input_format) if self._text_filter is None else None
            yield from _chosen(self._choose_text, [record], chunk) if texts is None else texts

    def _choose_text(self, record: RawRecord, chunk: EncodedChunk) -> str:
        """Return the text of a record. Raises BadDocument and LeftOut."""
        text = parse_text(record, self.input_format)
        return text if self._text_filter is None else self._text_filter.choose(text, lambda: record.origin)

    def _choose(self, record: RawRecord, chunk: EncodedChunk) -> Sequence[str | _CheckedImage]:
        """Return the parts of a record that stay; `chunk` counts the others. Raises BadDocument and LeftOut."""
        document = parse_record(self.kind, record, self.input_format)
        parts, images = list[str | _CheckedImage](), list[_CheckedImage]()
        for part in document.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                data = part.read()
                suffix, dropped = self._check(data, part.name, len(images))
            except UnusableImage as unusable:
                if not self.filters.drop_unusable_images:
                    raise BadDocument(document.origin, unusable.reason, unusable.detail) from unusable
                chunk.dropped_images[unusable.reason] += 1
                continue
            if dropped is not None:
                chunk.dropped_images[dropped] += 1
                continue
            images.append(_CheckedImage(data, suffix))
            parts.append(images[-1])
        if not images and any(isinstance(part, ImageReference) for part in document.parts):
            raise LeftOut("no_images_left")
        if self.filters.halve_single_image and len(images) == 1 and _content_hash(parts)[0] % 2:
            raise LeftOut("halve_single_image")
        problem = self.row_format.problem(len(images))
        if problem is not None:
            raise BadDocument(document.origin, "too_many_images", problem)
        return parts

    def _with_images(
        self, chosen: Sequence[Sequence[str | _CheckedImage]], ids: Int32Array, lengths: Int64Array
    ) -> tuple[Int32Array, Int64Array, list[list[EncodedImage]]]:
        """Return ids and lengths of documents, given those of their texts, and where their pictures are in them."""
        texts = iter(np.split(ids, np.cumsum(lengths)))  # the last, which is empty, is never taken
        pair = np.array([self.tokenizer.image_id, self.tokenizer.end_of_image_id], np.int32)
        pieces, lengths_of_documents, images_of = [np.zeros(0, np.int32)], list[int](), list[list[EncodedImage]]()
        for parts in chosen:
            length, images = 0, list[EncodedImage]()
            for part in parts:
                if isinstance(part, _CheckedImage):
                    images.append(EncodedImage(part.data, part.extension, 1 + length))
                pieces.append(next(texts) if isinstance(part, str) else pair)
                length += len(pieces[-1])
            lengths_of_documents.append(length)
            images_of.append(images)
        return np.concatenate(pieces), np.array(lengths_of_documents, np.int64), images_of

    def _enclosed(self, ids: Int32Array, lengths: Int64Array) -> NDArray[Any]:
        """Return documents of so many `ids` in `<s> … </s>`."""
        ends = np.cumsum(lengths + 2)
        is_inside = np.ones(len(ids) + 2 * len(lengths), np.bool_)
        is_inside[ends - 1] = is_inside[ends - lengths - 2] = False
        tokens = np.empty(len(is_inside), self._dtype)
        tokens[is_inside] = ids
        tokens[ends - lengths - 2], tokens[ends - 1] = self.tokenizer.bos_id, self.tokenizer.eos_id
        return tokens

    def _check(self, data: bytes, name: str, num_kept: int) -> tuple[str, str | None]:
        """Return the usual extension of a picture's format, and the filter that drops it. Raises UnusableImage."""
        try:
            image = open_image(data)
            return extension(image), self._reason_to_drop(image, num_kept)
        except UnusableImage as error:
            raise UnusableImage(error.reason, f"{name}: {error.detail}") from error

    def _reason_to_drop(self, image: Image.Image, num_kept: int) -> str | None:
        filters = self.filters
        if filters.max_images is not None and num_kept >= filters.max_images:
            return "max_images"
        if filters.min_image_side is not None and min(image.size) < filters.min_image_side:
            return "min_image_side"
        # An eighth of a JPEG's pixels take all of its bytes to decode, so damage shows.
        pixels = decode(image, shrink_to=None if filters.drop_single_colour else 1)
        if filters.drop_single_colour and len(pixels.getcolors(1) or ()) == 1:
            return "drop_single_colour"
        return None


def _chosen(
    choose: Callable[[RawRecord, EncodedChunk], Chosen], records: Sequence[RawRecord], chunk: EncodedChunk
) -> Iterator[Chosen]:
    """Yield what `choose` makes of each document; `chunk` accounts for those that it refuses."""
    for record in chain.from_iterable(record.each() for record in records):
        try:
            yield choose(record, chunk)
        except BadDocument as problem:
            problem.excerpt = record.excerpt
            chunk.bad.append(problem)
        except LeftOut as left_out:
            chunk.filtered[left_out.reason] += 1


def document_digest(tokens: NDArray[Any], images: Sequence[EncodedImage]) -> bytes:
    """Return a hash of 128 bits that documents of the same tokens and pictures have, and no others."""
    return content_digest(tokens.tobytes(), *(image.digest for image in images))


def _digests(chunk: EncodedChunk) -> Iterator[bytes]:
    """Yield a hash of the tokens and pictures of each document."""
    ends = np.cumsum(chunk.lengths)
    for number, (begin, end) in enumerate(zip(ends - chunk.lengths, ends, strict=True)):
        yield document_digest(chunk.tokens[begin:end], chunk.images[number] if chunk.images else ())


def _content_hash(parts: Sequence[str | _CheckedImage]) -> bytes:
    content = hashlib.sha256()
    for part in parts:
        content.update(part.encode() if isinstance(part, str) else part.data)
    return content.digest()
