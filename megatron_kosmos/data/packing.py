"""Packed rows: the tokens, targets and pictures of a corpus in rows of T tokens, as they were planned.

Shape letters: T tokens of a row, D documents.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.corpus import Corpus
from megatron_kosmos.data.cutting import Int64Array
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.planning import EpochPlan, ImagePlaces, Planner, Shuffle
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.tokenizer import KosmosTokenizer


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
        num_images = corpus.num_images
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
        store = corpus.images
        places = None if store is None else ImagePlaces(store.first_images, store.positions)
        self._planner = Planner(corpus.kind, corpus.lengths, places, row_format)

    @cached_property
    def identity(self) -> str:
        """All that plans depend on besides the order of the documents."""
        files = sorted(record.sha256 for record in self.corpus.manifest.files.values())
        documents = hashlib.sha256(self.documents.data).hexdigest()
        return f"{self.corpus.kind} {files} {self._format.model_dump_json()} {documents}"

    def plan(self, order: Int64Array, packing: Packing = "concatenate", shuffle: Shuffle = np.arange) -> EpochPlan:
        """Plan the rows of the documents `order`, in that order; `shuffle` orders rows of whole documents."""
        return self._planner.plan(order, packing, shuffle)

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
                if is_full and high == stop and high - offset < self._planner.lengths[document]:
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
