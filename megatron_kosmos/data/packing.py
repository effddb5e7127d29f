"""Packing documents into rows of T tokens: concatenation across documents that never cuts a picture's block.

The documents of an epoch form one stream, in which a picture is a block of L + 2 tokens: `<image>`, L slots and
`</image>`. Row after row takes the next T tokens (the "full-sentence" format of arXiv 2302.14045, section 3.2). Where a
block would be cut, the rest of the row is padding and the next row begins with the block. Captions are blocks as
wholes: a text without its picture teaches nothing.

Shape letters: T tokens of a row, L slots of a picture, D documents, N pictures.
"""

from array import array
from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.data.corpus import Corpus
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.tokenizer import KosmosTokenizer

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """Where the rows of one epoch lie in its stream of tokens."""

    order: Int64Array
    """Documents in the order of the epoch: [D]."""
    document_starts: Int64Array
    """Where each of them starts in the stream, and the stream's length: [D + 1]."""
    row_starts: Int64Array
    row_stops: Int64Array
    """Row k holds the tokens row_starts[k] … row_stops[k] - 1 and padding. Together rows hold every token once."""

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return len(self.row_starts)


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


def cut_rows(
    total: int, block_starts: Int64Array, block_stops: Int64Array, length: int
) -> tuple[Int64Array, Int64Array]:
    """Cut a stream of `total` tokens into rows of at most `length` that cut no block; return their starts and stops.

    Blocks are sorted, disjoint and at most `length` long.
    """
    if len(block_starts) == 0:
        starts = np.arange(0, total, length, dtype=np.int64)
        return starts, np.minimum(starts + length, total)
    first, last = array("q", block_starts.tobytes()), array("q", block_stops.tobytes())
    cuts = array("q", [0])
    cut, block = 0, 0
    while cut + length < total:
        cut += length
        block = bisect_left(first, cut, lo=block) - 1  # the last block that starts before the cut
        if block >= 0 and last[block] > cut:
            cut = first[block]
        block = max(block, 0)
        if cut <= cuts[-1]:
            raise ValueError(f"the block at {cut} has {last[block] - cut} tokens, a row {length}")
        cuts.append(cut)
    cuts.append(total)
    edges = np.frombuffer(cuts, dtype=np.int64)
    return edges[:-1], edges[1:]


class Packer:
    """The rows of one corpus under one row format."""

    def __init__(self, corpus: Corpus, row_format: RowFormat, tokenizer: KosmosTokenizer, skip_misfits: bool) -> None:
        """Raises DataError for a document whose pictures don't fit a row, unless `skip_misfits` leaves it out."""
        self.corpus, self._format, self._tokenizer = corpus, row_format, tokenizer
        self._num_images = num_images = corpus.num_images
        fits = num_images <= row_format.max_images
        self.documents: Int64Array = np.flatnonzero(fits)
        """Documents that are packed."""
        self.num_misfits = len(corpus) - len(self.documents)
        """Documents that are left out because they have too many pictures for a row."""
        if self.num_misfits and not (skip_misfits and len(self.documents)):
            misfit = int(np.argmin(fits))
            options = f"--sequence-length {row_format.sequence_length} --num-latents {row_format.num_latents}"
            raise DataError(
                f"{corpus.prefix}: document {misfit} (and {self.num_misfits - 1} more): "
                f"{row_format.problem(int(num_images[misfit]))}. Prepare the corpus with {options}, "
                f"or leave such documents out with data.on_bad_document: skip"
            )
        self._lengths: Int64Array = corpus.lengths.astype(np.int64) + row_format.num_latents * num_images
        """Tokens of each document in the stream, slots included: [D]."""
        self._is_whole = (corpus.kind == "caption") & (self._lengths <= row_format.sequence_length)

    def plan(self, order: Int64Array) -> EpochPlan:
        """Plan the rows of the documents `order`, in that order. A million documents take about a second."""
        starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(self._lengths[order], out=starts[1:])
        block_starts, block_stops = self._blocks(order, starts)
        row_starts, row_stops = cut_rows(int(starts[-1]), block_starts, block_stops, self._format.sequence_length)
        return EpochPlan(order, starts, row_starts, row_stops)

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
        is_full = stop - start == length
        stop_read = min(stop + 1, int(plan.document_starts[-1])) if is_full else stop  # a full row needs one label more
        ids = np.full(length + 1, self._tokenizer.pad_id, dtype=np.int64)
        is_target = np.zeros(length + 1, dtype=np.bool_)
        document_ids = np.full(length + 1, -1, dtype=np.int32)
        images: list[int] = []
        columns: list[int] = []
        place = int(np.searchsorted(plan.document_starts, start, side="right")) - 1
        number_in_row = 0
        while plan.document_starts[place] < stop_read:
            document, offset = int(plan.order[place]), int(plan.document_starts[place])
            low, high = max(start, offset), min(stop_read, int(plan.document_starts[place + 1]))
            row = slice(low - start, high - start)
            ids[row], is_target[row], slots = self._read(document, low - offset, high - offset)
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
