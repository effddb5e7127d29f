"""Packing documents into rows of T tokens so that no picture's block is cut.

In the stream of an epoch's documents a picture is a block of L + 2 tokens: `<image>`, L slots and `</image>`. Captions
are blocks as wholes: a text without its picture teaches nothing.
- `concatenate`: row after row takes the next T tokens (the "full-sentence" format of arXiv 2302.14045, section 3.2).
  Where a block would be cut, the rest of the row is padding and the next row begins with the block.
- `best_fit`, `best_fit_decreasing`: rows hold whole documents (data/bins.py). Only a document longer than a row is cut,
  into pieces as long as they may be, and what is left of it is packed like a document. Rows are shuffled.

Shape letters: T tokens of a row, L slots of a picture, D documents, N pieces of documents.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.bins import best_fit, best_fit_decreasing
from megatron_kosmos.data.corpus import Corpus
from megatron_kosmos.data.cutting import Int64Array, cut_documents, cut_rows
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.tokenizer import KosmosTokenizer

Shuffle = Callable[[int], Int64Array]
"""Returns a permutation of so many items."""


@dataclass(frozen=True)
class EpochPlan:
    """Where the rows of one epoch lie in its stream of tokens."""

    documents: Int64Array
    """Documents, or pieces of them, in the order of the stream: [N]."""
    piece_starts: Int64Array
    """Where each of them starts in the stream, and the stream's length: [N + 1]."""
    offsets: Int64Array | None
    """Token of its document that each piece begins with: [N]. None: rows are cut out of a stream of whole documents, so
    that a row may begin within one, and what follows its last token is the next row's first."""
    row_starts: Int64Array
    row_stops: Int64Array
    """Row k holds the tokens row_starts[k] … row_stops[k] - 1 and padding. Together rows hold every token once."""

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return len(self.row_starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the epoch, slots included."""
        return int(self.piece_starts[-1])

    def count_cut_documents(self) -> int:
        """Return the number of documents that lie in more than one row."""
        if self.offsets is not None:
            return len(np.unique(self.documents[self.offsets > 0]))
        places = np.searchsorted(self.piece_starts, self.row_starts, side="right") - 1
        return len(np.unique(places[self.piece_starts[places] < self.row_starts]))


@dataclass(frozen=True)
class PackedRow:
    """One training sequence and the pictures in it."""

    input_ids: Int64Array
    """[T]. Slots and padding hold the padding id."""
    labels: Int64Array
    """[T]. The token that follows."""
    loss_mask: NDArray[np.bool_]
    """[T]. True where the label is text or `</s>`: not `<s>`, `<image>`, a slot, `</image>` or padding."""
    document_ids: NDArray[np.int32]
    """[T]. Number of the document in the row, padding -1."""
    images: tuple[int, ...]
    """Numbers of the pictures in the corpus."""
    image_columns: tuple[int, ...]
    """Column of the first slot of each."""

    def without_targets(self) -> "PackedRow":
        """Return the same row with nothing that counts in the loss."""
        return replace(self, loss_mask=np.zeros_like(self.loss_mask))


class Packer:
    """The rows of one corpus under one row format."""

    def __init__(
        self,
        corpus: Corpus,
        row_format: RowFormat,
        tokenizer: KosmosTokenizer,
        skip_misfits: bool,
        documents: Int64Array | None = None,
    ) -> None:
        """Take the corpus, or `documents` of it, sorted.

        Raises DataError for a document whose pictures don't fit a row, unless `skip_misfits` leaves it out.
        """
        self.corpus, self._format, self._tokenizer = corpus, row_format, tokenizer
        self._num_images = num_images = corpus.num_images
        documents = np.arange(len(corpus)) if documents is None else documents
        fits = num_images[documents] <= row_format.max_images
        self.documents: Int64Array = documents[fits]
        """Documents that are packed."""
        self.num_misfits = len(documents) - len(self.documents)
        """Documents that are left out because they have too many pictures for a row."""
        if self.num_misfits and not (skip_misfits and len(self.documents)):
            misfit = int(documents[np.argmin(fits)])
            options = f"--sequence-length {row_format.sequence_length} --num-latents {row_format.num_latents}"
            raise DataError(
                f"{corpus.prefix}: document {misfit} (and {self.num_misfits - 1} more): "
                f"{row_format.problem(int(num_images[misfit]))}. Prepare the corpus with {options}, "
                f"or leave such documents out with data.on_bad_document: skip"
            )
        self._lengths: Int64Array = corpus.lengths.astype(np.int64) + row_format.num_latents * num_images
        """Tokens of each document in the stream, slots included: [D]."""
        self._is_whole = (corpus.kind == "caption") & (self._lengths <= row_format.sequence_length)

    @cached_property
    def identity(self) -> str:
        """All that plans depend on besides the order of the documents."""
        files = sorted(record.sha256 for record in self.corpus.manifest.files.values())
        documents = hashlib.sha256(self.documents.data).hexdigest()
        return f"{self.corpus.kind} {files} {self._format.model_dump_json()} {documents}"

    def plan(self, order: Int64Array, packing: Packing = "concatenate", shuffle: Shuffle = np.arange) -> EpochPlan:
        """Plan the rows of the documents `order`, in that order; `shuffle` orders rows of whole documents."""
        length = self._format.sequence_length
        if packing != "concatenate":
            return self._plan_whole_documents(
                order, best_fit if packing == "best_fit" else best_fit_decreasing, shuffle
            )
        starts = _running_sum(self._lengths[order])
        row_starts, row_stops = cut_rows(int(starts[-1]), *self._blocks(order, starts), length)
        return EpochPlan(order, starts, None, row_starts, row_stops)

    def _plan_whole_documents(
        self, order: Int64Array, choose_rows: Callable[[Int64Array, int], Int64Array], shuffle: Shuffle
    ) -> EpochPlan:
        documents, offsets, sizes = self._pieces(order)
        rows = choose_rows(sizes, self._format.sequence_length)
        num_rows = int(rows.max()) + 1
        rows = shuffle(num_rows)[rows]
        by_row = np.argsort(rows, kind="stable")  # within a row, documents stay in their order
        starts = _running_sum(sizes[by_row])
        edges = starts[_running_sum(np.bincount(rows, minlength=num_rows))]
        return EpochPlan(documents[by_row], starts, offsets[by_row], edges[:-1], edges[1:])

    def _pieces(self, order: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return the documents `order`, those longer than a row in pieces: document, first token and length of each."""
        lengths = self._lengths[order]
        is_long = lengths > self._format.sequence_length
        if not is_long.any():
            return order, np.zeros_like(lengths), lengths
        starts = _running_sum(lengths[is_long])
        cuts = cut_documents(starts, *self._blocks(order[is_long], starts), self._format.sequence_length)
        counts = np.ones_like(lengths)
        counts[is_long] = np.diff(np.searchsorted(cuts, starts))
        is_cut = np.repeat(is_long, counts)
        sizes, offsets = np.repeat(lengths, counts), np.zeros(len(is_cut), dtype=np.int64)
        sizes[is_cut] = np.diff(cuts, append=starts[-1])
        offsets[is_cut] = cuts - np.repeat(starts[:-1], counts[is_long])
        return np.repeat(order, counts), offsets, sizes

    def _blocks(self, order: Int64Array, starts: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return where the stream's uncuttable blocks start and stop, in order."""
        whole = self._is_whole[order]
        block_starts, block_stops = starts[:-1][whole], starts[1:][whole]
        if self.corpus.images is None:
            return block_starts, block_stops
        cuttable = np.flatnonzero(~whole)
        documents = order[cuttable]
        first, counts = self.corpus.images.first_images[documents], self._num_images[documents]
        # Picture n of a document: its `<image>` comes after the L slots of each picture before it.
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = self.corpus.images.positions[np.repeat(first, counts) + number]
        image_starts = np.repeat(starts[cuttable], counts) + positions + self._format.num_latents * number
        image_stops = image_starts + self._format.block_length
        if len(block_starts) == 0:
            return image_starts, image_stops
        block_starts = np.concatenate([block_starts, image_starts])
        block_stops = np.concatenate([block_stops, image_stops])
        by_start = np.argsort(block_starts, kind="stable")
        return block_starts[by_start], block_stops[by_start]

    def row(self, plan: EpochPlan, number: int) -> PackedRow:
        """Return row `number` of `plan`. Raises DataError when the corpus contradicts its own index."""
        length = self._format.sequence_length
        start, stop = int(plan.row_starts[number]), int(plan.row_stops[number])
        is_full = stop - start == length  # its last column needs one label more
        runs_on = is_full and plan.offsets is None
        stop_read = min(stop + 1, plan.num_tokens) if runs_on else stop
        ids = np.full(length + 1, self._tokenizer.pad_id, dtype=np.int64)
        is_target = np.zeros(length + 1, dtype=np.bool_)
        document_ids = np.full(length + 1, -1, dtype=np.int32)
        images: list[int] = []
        columns: list[int] = []
        place = int(np.searchsorted(plan.piece_starts, start, side="right")) - 1
        number_in_row = 0
        while plan.piece_starts[place] < stop_read:
            document, offset = int(plan.documents[place]), int(plan.piece_starts[place])
            low, high = max(start, offset), min(stop_read, int(plan.piece_starts[place + 1]))
            if plan.offsets is not None:
                offset -= int(plan.offsets[place])  # where the document would start
                if is_full and high == stop and high - offset < self._lengths[document]:
                    high += 1  # the rest of this document is in another row
            row = slice(low - start, high - start)
            ids[row], is_target[row], slots = self._read(document, low - offset, high - offset)
            if plan.offsets is not None:
                is_target[low - start] = False  # before it in this row is another document, or nothing
            document_ids[row] = number_in_row
            for image, slot in slots:
                if offset + slot < stop:  # else its `<image>` is only the last label
                    images.append(image)
                    columns.append(offset + slot - start)
            place, number_in_row = place + 1, number_in_row + 1
        return PackedRow(ids[:-1], ids[1:], is_target[1:], document_ids[:-1], tuple(images), tuple(columns))

    def _read(self, document: int, low: int, high: int) -> tuple[Int64Array, NDArray[np.bool_], list[tuple[int, int]]]:
        """Return tokens `low` … `high` - 1 of a document with slots: ids, which are text, and its pictures there.

        Each picture comes as its number and the place of its first slot in the document.
        """
        tokens = self.corpus.tokens(document)
        numbers = self.corpus.images_of(document)
        if len(numbers) == 0:
            is_text = np.ones(high - low, dtype=np.bool_)
            is_text[: 1 if low == 0 else 0] = False  # <s>
            return tokens[low:high].astype(np.int64), is_text, []
        positions = self.corpus.image_positions(document)
        num_latents = self._format.num_latents
        is_text = np.ones(len(tokens), dtype=np.bool_)
        is_text[0] = is_text[positions] = is_text[positions + 1] = False
        slots = np.repeat(positions + 1, num_latents)
        ids = np.insert(tokens.astype(np.int64), slots, self._tokenizer.pad_id)
        is_text = np.insert(is_text, slots, False)
        first_slots = positions + 1 + num_latents * np.arange(len(positions))
        pictures = [pair for pair in zip(numbers, first_slots.tolist(), strict=True) if low <= pair[1] - 1 < high]
        return ids[low:high], is_text[low:high], pictures


def _running_sum(sizes: Int64Array) -> Int64Array:
    """Return where each of the items starts, and where the last one ends."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
