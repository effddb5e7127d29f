"""What a person wants to see of a blend: packed rows as the model gets them, pictures, and what the blend consists of.

Shape letters: T tokens of a row, L slots of a picture, S image side in pixels, D documents.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megatron_kosmos.config.data import DataConfig, data_step
from megatron_kosmos.data.arrays import BoolArray, Int64Array
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.loading.collate import ImageFormat
from megatron_kosmos.data.loading.loader import BatchGeometry, StepLoader
from megatron_kosmos.data.loading.packed_rows import PackedRow
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD

CONTEXT_TOKENS = 60
"""Tokens before and behind a picture that are shown with it."""


@dataclass(frozen=True)
class Token:
    """A token of a row; the slots of a picture are one."""

    text: str
    """As the tokenizer's model writes it, or `[image L]`."""
    is_target: bool
    """Whether predicting it counts in the loss."""
    image: int | None = None
    """Number of the picture in its corpus."""


@dataclass(frozen=True)
class DocumentView:
    """A document, or what a row has of it."""

    first_column: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class RowView:
    """A packed row."""

    sample: int
    """Its global index."""
    corpus: Corpus
    documents: tuple[DocumentView, ...]
    num_padding: int
    num_targets: int
    next_token: Token | None
    """What the last column is to predict, where that counts: it is not in the row."""

    @property
    def headline(self) -> str:
        """What there is to say about the row, in a line."""
        num_images = sum(token.image is not None for document in self.documents for token in document.tokens)
        return (
            f"sample {self.sample} of {self.corpus.prefix} ({self.corpus.kind}): {len(self.documents)} documents, "
            f"{num_images} pictures, {self.num_targets} tokens count in the loss, {self.num_padding} are padding"
        )


@dataclass(frozen=True)
class PictureView:
    """A picture as the model sees it, and what stands around it."""

    corpus: Corpus
    image: int
    pixels: Image.Image | None
    """[S, S] in RGB; None when it does not decode."""
    problem: str
    """Why it does not decode."""
    before: str
    after: str


@dataclass(frozen=True)
class CorpusView:
    """What a corpus has in the blend."""

    corpus: Corpus
    num_documents: int
    """Documents that are packed, without those that are held out or have too many pictures."""
    num_images: int
    """Pictures in them."""
    lengths: Int64Array
    """Tokens of each of them, slots included: [D]."""
    weight_share: float
    """Share of the rows that the configuration asks for."""
    sample_share: float
    """Share of the rows in the steps that were counted."""


class Inspection:
    """A blend, opened to be looked at."""

    def __init__(self, data: DataConfig, images: ImageFormat, global_batch_size: int, seed: int) -> None:
        """Open the corpora as training does. Raises DataError."""
        self._data, self.images, self.global_batch_size, self.seed = data, images, global_batch_size, seed
        self._loader = StepLoader(data, images, BatchGeometry(1, global_batch_size), seed)
        self._mixture = self._loader.mixture
        self._tokenizer = KosmosTokenizer.load(data.tokenizer)

    def packing(self) -> str:
        """Return what a run says of its packing at the start."""
        return str(self._loader.packing_report())

    def rows(self, step: int, num_steps: int = 1) -> Iterator[RowView]:
        """Yield the rows of `num_steps` training steps from `step` on, counted from 1, in their order.

        Raises DataError when the corpora have ended before `step`.
        """
        if self._has_ended(step):
            raise DataError(f"the corpora of data.train have ended before step {step}: each has a number of epochs")
        for index in self._samples(range(step, step + num_steps)):
            yield self._row(index)

    def pictures(self, step: int, num_steps: int) -> Iterator[PictureView]:
        """Yield the pictures of `num_steps` steps from `step` on."""
        for index in self._samples(range(step, step + num_steps)):
            sample = self._mixture[index]
            for image in sample.row.images:
                yield self.picture(self._mixture.packers[sample.corpus].corpus, image)

    def corpora(self, num_steps: int) -> list[CorpusView]:
        """Return the corpora, with their shares in the first `num_steps` steps or all there are."""
        samples = self._samples(range(1, num_steps + 1))
        counts = Counter(self._mixture.blend.locate(index)[0] for index in samples)
        weight = sum(corpus.weight for corpus in self._data.train)
        views = []
        for number, packer in enumerate(self._mixture.packers):
            corpus = packer.corpus
            lengths = corpus.lengths.astype(np.int64) + self.images.num_latents * corpus.num_images
            views.append(
                CorpusView(
                    corpus,
                    len(packer.documents),
                    int(corpus.num_images[packer.documents].sum()),
                    lengths[packer.documents],
                    self._data.train[number].weight / weight,
                    counts[number] / max(1, counts.total()),
                )
            )
        return views

    def _samples(self, steps: range) -> Iterator[int]:
        """Yield the global indices of the samples of `steps`, as far as the corpora last."""
        for step in steps:
            if self._has_ended(step):
                return
            first = data_step(step - 1, self._data.skip_steps) * self.global_batch_size
            yield from range(first, first + self.global_batch_size)

    def _has_ended(self, step: int) -> bool:
        num_samples = self._mixture.blend.num_samples
        stop = (data_step(step - 1, self._data.skip_steps) + 1) * self.global_batch_size
        return num_samples is not None and stop > num_samples

    def _row(self, index: int) -> RowView:
        sample = self._mixture[index]
        row = sample.row
        # A column's label is the next one's token: the first column is never a target.
        is_target = np.append(False, row.loss_mask[:-1])
        documents = []
        for number in range(int(row.document_ids.max()) + 1):
            columns = np.flatnonzero(row.document_ids == number)
            documents.append(DocumentView(int(columns[0]), tuple(self._tokens(row, columns.tolist(), is_target))))
        label = Token(self._tokenizer.piece(int(row.labels[-1])), True) if row.loss_mask[-1] else None
        return RowView(
            sample=index,
            corpus=self._mixture.packers[sample.corpus].corpus,
            documents=tuple(documents),
            num_padding=int((row.document_ids < 0).sum()),
            num_targets=int(row.loss_mask.sum()),
            next_token=label,
        )

    def _tokens(self, row: PackedRow, columns: list[int], is_target: BoolArray) -> Iterator[Token]:
        num_latents = self.images.num_latents
        image_at = dict(zip(row.image_columns, row.images, strict=True))
        slots = {column + slot for column in image_at for slot in range(1, num_latents)}
        for column in columns:
            if column in image_at:
                yield Token(f"[image {num_latents}]", False, image_at[column])
            elif column not in slots:
                yield Token(self._tokenizer.piece(int(row.input_ids[column])), bool(is_target[column]))

    def picture(self, corpus: Corpus, image: int) -> PictureView:
        """Return a picture with what stands around it."""
        store = corpus.images
        assert store is not None, "a row of a corpus without pictures names a picture"
        document = int(np.searchsorted(store.first_images, image, side="right")) - 1
        tokens, place = corpus.tokens(document), int(store.positions[image])
        before = self._tokenizer.decode(tokens[max(0, place - CONTEXT_TOKENS) : place])
        after = self._tokenizer.decode(tokens[place + 2 : place + 2 + CONTEXT_TOKENS])
        try:
            pixels, problem = as_seen(store.read(image), self.images.size), ""
        except DataError as error:
            pixels, problem = None, f"{store.locate(image)}: {error}"
        return PictureView(corpus, image, pixels, problem, before, after)


def as_seen(data: bytes, image_size: int) -> Image.Image:
    """Return what the vision tower gets of an encoded picture, [S, S], with the normalization taken back.

    Raises DataError when it does not decode.
    """
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    pixels = ((load_image(data, image_size) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
