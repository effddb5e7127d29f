"""From packed rows to a `MultimodalBatch`: stacking, and decoding the pictures.

Shape letters: B rows, T tokens, I images, S image side, L slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch, row_starts, share_of_images
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.augmentation import Augmenter
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.loading.mixture import Sample
from megatron_kosmos.data.loading.packed_rows import PackedRow
from megatron_kosmos.prompt import SOURCE_KINDS


@dataclass(frozen=True)
class ImageFormat:
    """What the model makes of a picture."""

    num_latents: int
    """L, slots of a picture."""
    size: int
    """S, side in pixels."""


@dataclass(frozen=True)
class RankPart:
    """What a rank reads of its batches. The rest is metadata, which every rank takes from the indexes."""

    tokens: bool = True
    images: bool = True
    """Decode this tensor-parallel rank's share of each microbatch's pictures."""
    tp_rank: int = 0
    tp_size: int = 1


@dataclass(frozen=True)
class Microbatch:
    """A batch, or why there is none, on its way from a worker process."""

    batch: MultimodalBatch | None = None
    bad_images: tuple[str, ...] = ()
    """Where pictures lie that did not decode and are blank in the batch."""
    failure: str | None = None

    def unwrap(self) -> MultimodalBatch:
        """Return the batch. Raises DataError if there is none."""
        if self.batch is None:
            raise DataError(self.failure)
        return self.batch


class Collator:
    """Makes microbatches of samples from `corpora`."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        images: ImageFormat,
        *,
        part: RankPart,
        stop_at_bad_image: bool,
        mask_documents: bool,
        augmenter: Augmenter | None = None,
    ) -> None:
        self._corpora, self._size, self._mask_documents = corpora, images.size, mask_documents
        self._part, self._augmenter, self._stop_at_bad_image = part, augmenter, stop_at_bad_image

    def __call__(self, samples: Sequence[Sample]) -> Microbatch:
        """Return the microbatch of `samples`. Raises DataError for a bad picture if that is to stop the run."""
        rows = [sample.row for sample in samples]
        bad_images: list[str] = []
        numbers = [(sample, number) for sample in samples for number in range(len(sample.row.images))]
        pictures = [self._picture(sample, number, bad_images) for sample, number in numbers[self._mine(len(numbers))]]
        places = [(number, column) for number, row in enumerate(rows) for column in row.image_columns]
        input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]))
        starts, positions = self._documents(rows)
        batch = MultimodalBatch(
            input_ids=input_ids,
            labels=torch.from_numpy(np.stack([row.labels for row in rows])),
            loss_mask=torch.from_numpy(np.stack([row.loss_mask for row in rows])),
            position_ids=positions,
            document_starts=starts,
            images=torch.stack(pictures) if pictures else torch.zeros(0, 3, self._size, self._size),
            image_positions=torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
            sources=torch.tensor([SOURCE_KINDS.index(self._corpora[sample.corpus].kind) for sample in samples]),
        )
        return Microbatch(batch, tuple(bad_images))

    def _mine(self, num_images: int) -> slice:
        """Return which of a microbatch's pictures this rank decodes."""
        part = self._part
        return share_of_images(num_images, part.tp_rank, part.tp_size) if part.images else slice(0)

    def _documents(self, rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
        """Return where attention's segments begin [N + 1] and the positions [B, T], by document or by row."""
        num_rows, length = len(rows), len(rows[0].loss_mask)
        starts = row_starts(num_rows, length)
        if self._mask_documents:
            ids = np.concatenate([row.document_ids for row in rows])
            is_start = np.append(ids[1:] != ids[:-1], True)
            is_start[length - 1 :: length] = True
            starts = torch.from_numpy(np.append(0, np.flatnonzero(is_start) + 1).astype(np.int32))
        positions = torch.arange(num_rows * length) - starts[:-1].long().repeat_interleave(starts.diff())
        return starts, positions.view(num_rows, length)

    def _picture(self, sample: Sample, number: int, bad_images: list[str]) -> Tensor:
        """Return the picture `number` of a sample, [3, S, S].

        One that does not decode is blank and goes to `bad_images`, or raises DataError.
        """
        store, image = self._corpora[sample.corpus].images, sample.row.images[number]
        assert store is not None, "a row of a corpus without pictures names a picture"
        try:
            draw_view = None if self._augmenter is None else partial(self._augmenter.draw_view, sample.index, number)
            return load_image(store.read(image), self._size, draw_view)
        except DataError as error:
            problem = f"{store.locate(image)}: {error}"
            if self._stop_at_bad_image:
                raise DataError(problem) from error
            bad_images.append(problem)
            return torch.zeros(3, self._size, self._size)
