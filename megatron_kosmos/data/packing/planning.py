"""Planning which documents fill which rows of T tokens, so that no picture's block is cut.

In the stream of an epoch's documents a picture is a block of L + 2 tokens: `<image>`, L slots and `</image>`. Captions
are blocks as wholes: a text without its picture teaches nothing.
- `concatenate`: row after row takes the next T tokens (the "full-sentence" format of arXiv 2302.14045, section 3.2).
  Where a block would be cut, the rest of the row is padding and the next row begins with the block.
- `best_fit`, `best_fit_decreasing`: rows hold whole documents (bins.py). Only a document longer than a row is cut,
  into pieces as long as they may be, and what is left of it is packed like a document. Rows are shuffled.

Shape letters: T tokens of a row, L slots of a picture, D documents, N pieces of documents, I pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.arrays import Int64Array
from megatron_kosmos.data.packing.bins import best_fit, best_fit_decreasing
from megatron_kosmos.data.packing.cutting import cut_documents, cut_rows
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.prompt import SourceKind

Shuffle = Callable[[int], Int64Array]
"""Returns a permutation of so many items."""


class ImagePlaces(NamedTuple):
    """Which pictures documents have, and where."""

    first_images: NDArray[Any]
    """First picture of each document, and their number: [D + 1]."""
    positions: NDArray[Any]
    """Index of each picture's `<image>` among the tokens of its document: [I]."""


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


class Planner:
    """Plans the rows of one corpus under one row format."""

    def __init__(
        self, kind: SourceKind, lengths: NDArray[Any], places: ImagePlaces | None, row_format: RowFormat
    ) -> None:
        """Take the tokens of each document on disk [D], where a picture counts two, and the places of the pictures."""
        self._kind, self._places, self._format = kind, places, row_format
        self._num_images = np.zeros(len(lengths), np.int64) if places is None else np.diff(places.first_images)
        self.lengths: Int64Array = lengths.astype(np.int64) + row_format.num_latents * self._num_images
        """Tokens of each document in the stream, slots included: [D]."""
        self._is_whole = (kind == "caption") & (self.lengths <= row_format.sequence_length)

    def plan(self, order: Int64Array, packing: Packing = "concatenate", shuffle: Shuffle = np.arange) -> EpochPlan:
        """Plan the rows of the documents `order`, in that order; `shuffle` orders rows of whole documents."""
        length = self._format.sequence_length
        if packing != "concatenate":
            return self._plan_whole_documents(
                order, best_fit if packing == "best_fit" else best_fit_decreasing, shuffle
            )
        starts = _running_sum(self.lengths[order])
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
        lengths = self.lengths[order]
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
        if self._places is None:
            return block_starts, block_stops
        cuttable = np.flatnonzero(~whole)
        documents = order[cuttable]
        first, counts = self._places.first_images[documents], self._num_images[documents]
        # Picture n of a document: its `<image>` comes after the L slots of each picture before it.
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = self._places.positions[np.repeat(first, counts) + number]
        image_starts = np.repeat(starts[cuttable], counts) + positions + self._format.num_latents * number
        image_stops = image_starts + self._format.block_length
        if len(block_starts) == 0:
            return image_starts, image_stops
        block_starts = np.concatenate([block_starts, image_starts])
        block_stops = np.concatenate([block_stops, image_stops])
        by_start = np.argsort(block_starts, kind="stable")
        return block_starts[by_start], block_stops[by_start]


def _running_sum(sizes: Int64Array) -> Int64Array:
    """Return where each of the items starts, and where the last one ends."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
