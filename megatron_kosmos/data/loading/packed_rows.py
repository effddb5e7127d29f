"""Packed rows: the tokens, targets and pictures of a corpus in rows of T tokens, as they were planned.

Shape letters: T tokens of a row, D documents.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.arrays import BoolArray, Int32Array, Int64Array
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.packing.planning import EpochPlan, ImagePlaces, Planner, Shuffle
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer


@dataclass(frozen=True)
class PackedRow:
    """One training sequence and the pictures in it."""

    input_ids: Int64Array
    """[T]. Slots and padding hold the padding id. [0] from a packer that reads no tokens."""
    labels: Int64Array
    """[T]. The token that follows. [0] as above."""
    loss_mask: BoolArray
    """[T]. True where the label is text or `</s>`: not `<s>`, `<image>`, a slot, `</image>` or padding."""
    document_ids: Int32Array
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
        reads_tokens: bool = True,
    ) -> None:
        """Take the corpus, or `documents` of it, sorted. Rows hold no tokens unless the packer `reads_tokens`.

        Raises DataError for no documents at all, and for one whose pictures don't fit a row, unless `skip_misfits`
        leaves it out.
        """
        self.corpus, self._format, self._tokenizer = corpus, row_format, tokenizer
        self._reads_tokens = reads_tokens
        self._documents, self.num_misfits = documents, 0
        """Documents that are left out because they have too many pictures for a row."""
        if len(corpus if documents is None else documents) == 0:
            raise DataError(f"{corpus.prefix} has no documents: nothing can be read of it; prepare it again")
        # Arrays over all documents are made only to plan: a process that finds its plan does without their memory.
        if corpus.max_images > row_format.max_images:
            self._leave_out_misfits(skip_misfits)

    def _leave_out_misfits(self, skip_misfits: bool) -> None:
        documents = self.documents
        num_images = self.corpus.num_images[documents]
        fits = num_images <= self._format.max_images
        self._documents, self.num_misfits = documents[fits], len(documents) - int(fits.sum())
        if self.num_misfits and not (skip_misfits and fits.any()):
            misfit = int(np.argmin(fits))
            options = f"--sequence-length {self._format.sequence_length} --num-latents {self._format.num_latents}"
            raise DataError(
                f"{self.corpus.prefix}: document {documents[misfit]} (and {self.num_misfits - 1} more): "
                f"{self._format.problem(int(num_images[misfit]))}. Prepare the corpus with {options}, "
                f"or leave such documents out with data.on_bad_document: skip"
            )

    @property
    def documents(self) -> Int64Array:
        """Documents that are packed, sorted."""
        return np.arange(len(self.corpus)) if self._documents is None else self._documents

    @cached_property
    def identity(self) -> str:
        """All that plans depend on besides the order of the documents."""
        files = sorted(record.sha256 for record in self.corpus.manifest.files.values())
        documents = "all" if self._documents is None else hashlib.sha256(self._documents.data).hexdigest()
        return f"{self.corpus.kind} {files} {self._format.model_dump_json()} {documents}"

    def plan(self, order: Int64Array, packing: Packing = "concatenate", shuffle: Shuffle = np.arange) -> EpochPlan:
        """Plan the rows of the documents `order`, in that order; `shuffle` orders rows of whole documents."""
        store = self.corpus.images
        places = None if store is None else ImagePlaces(store.first_images, store.positions)
        planner = Planner(self.corpus.kind, self.corpus.lengths, places, self._format)
        return planner.plan(order, packing, shuffle)

    def documents_of_row(self, plan: EpochPlan, number: int) -> list[int]:
        """Return the documents of the corpus that row `number` of `plan` has a part of."""
        first = int(np.searchsorted(plan.piece_starts, plan.row_starts[number], side="right")) - 1
        stop = int(np.searchsorted(plan.piece_starts, plan.row_stops[number]))
        documents: list[int] = plan.documents[first:stop].tolist()
        return documents

    def row(self, plan: EpochPlan, number: int) -> PackedRow:
        """Return row `number` of `plan`. Raises DataError when the corpus contradicts its own index."""
        length = self._format.sequence_length
        start, stop = int(plan.row_starts[number]), int(plan.row_stops[number])
        is_full = stop - start == length  # its last column needs one label more
        runs_on = is_full and plan.offsets is None
        stop_read = min(stop + 1, plan.num_tokens) if runs_on else stop
        ids = np.full(length + 1 if self._reads_tokens else 1, self._tokenizer.pad_id, dtype=np.int64)
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
                if is_full and high == stop and high - offset < self._length(document):
                    high += 1  # the rest of this document is in another row
            row = slice(low - start, high - start)
            is_target[row], slots = self._layout(document, low - offset, high - offset)
            if self._reads_tokens:
                ids[row] = self._ids(document, low - offset, high - offset)
            if plan.offsets is not None:
                is_target[low - start] = False  # before it in this row is another document, or nothing
            document_ids[row] = number_in_row
            for image, slot in slots:
                if offset + slot < stop:  # else its `<image>` is only the last label
                    images.append(image)
                    columns.append(offset + slot - start)
            place, number_in_row = place + 1, number_in_row + 1
        return PackedRow(ids[:-1], ids[1:], is_target[1:], document_ids[:-1], tuple(images), tuple(columns))

    def _layout(self, document: int, low: int, high: int) -> tuple[BoolArray, list[tuple[int, int]]]:
        """Return which of a document's tokens `low` … `high` - 1, slots included, are text, and its pictures there.

        Each picture comes as its number and the place of its first slot in the document. Reads no token.
        """
        numbers, positions = self.corpus.images_of(document), self.corpus.image_positions(document)
        num_latents = self._format.num_latents
        first_slots = (positions + 1 + num_latents * np.arange(len(positions))).tolist()
        is_text = np.ones(high - low, dtype=np.bool_)
        is_text[: 1 if low == 0 else 0] = False  # <s>
        for slot in first_slots:  # <image>, slots, </image>
            is_text[max(0, slot - 1 - low) : max(0, slot + num_latents + 1 - low)] = False
        pictures = [pair for pair in zip(numbers, first_slots, strict=True) if low <= pair[1] - 1 < high]
        return is_text, pictures

    def _ids(self, document: int, low: int, high: int) -> Int64Array:
        """Return the same tokens themselves. Raises DataError as `Corpus.tokens` does."""
        tokens, positions = self.corpus.tokens(document), self.corpus.image_positions(document)
        if len(positions) == 0:
            return tokens[low:high].astype(np.int64)
        slots = np.repeat(positions + 1, self._format.num_latents)
        return np.insert(tokens.astype(np.int64), slots, self._tokenizer.pad_id)[low:high]

    def _length(self, document: int) -> int:
        num_slots = self._format.num_latents * len(self.corpus.images_of(document))
        return int(self.corpus.lengths[document]) + num_slots
