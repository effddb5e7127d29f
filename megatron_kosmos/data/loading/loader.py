"""Batches: the samples of each step, cut into microbatches for one data-parallel rank and read ahead by workers.

Step s takes the global samples s·G … (s+1)·G - 1, or those of a later step where data are skipped. Row b of microbatch
m on data-parallel rank r is sample s·G + (m·dp_size + r)·micro_batch_size + b, so that a step has the same samples
under any number of ranks.

G is the global batch size; S in shapes is the image side.
"""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config.data import CorpusConfig, DataConfig, data_step
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.augmentation import Augmenter
from megatron_kosmos.data.images.decoding import decode_image
from megatron_kosmos.data.loading.collate import Collator, ImageFormat, Microbatch, RankPart
from megatron_kosmos.data.loading.heldout_split import Side, documents_of
from megatron_kosmos.data.loading.mixture import Mixture, Sample
from megatron_kosmos.data.loading.packed_rows import Packer
from megatron_kosmos.data.loading.worker_end import end_with_parent
from megatron_kosmos.data.packing.plan_store import PlanStore
from megatron_kosmos.data.packing.report import CorpusPacking, PackingReport
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Microbatches that each worker process holds ready or works on. It gets the next when one of them is taken."""


@dataclass(frozen=True)
class BatchGeometry:
    """How a step's samples are shared out, and what this rank has of them."""

    micro_batch_size: int
    global_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    skip_steps: tuple[tuple[int, int], ...] = ()
    """Stretches of steps, counted from 1, whose samples are passed over (`data.skip_steps`)."""
    part: RankPart = field(default_factory=RankPart)

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size} x {self.dp_size} data-parallel ranks"
            )

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this rank in each step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def samples(self, microbatch: int) -> range:
        """Return the global samples of this rank's microbatch, counted from the first step on."""
        step, within = divmod(microbatch, self.num_microbatches)
        first = (
            data_step(step, self.skip_steps) * self.global_batch_size
            + (within * self.dp_size + self.dp_rank) * self.micro_batch_size
        )
        return range(first, first + self.micro_batch_size)


class Samples(Protocol):
    """Anything that gives the sample of a global index."""

    def __getitem__(self, index: int) -> Sample: ...


class StepLoader:
    """The training batches of one data-parallel rank, a pure function of (seed, step)."""

    def __init__(
        self,
        data: DataConfig,
        images: ImageFormat,
        geometry: BatchGeometry,
        seed: int,
        plan_folder: Path | None = None,
    ) -> None:
        """Open the corpora.

        What is packed into which row, and what is held out, is planned once for all processes that share `plan_folder`;
        without it each worker process plans and holds it for itself. Raises DataError when tokenizer or corpora are
        damaged or don't fit each other.
        """
        packers = [_open_packer(data, corpus, images, geometry.part, ("train", plan_folder)) for corpus in data.train]
        augmenter = None if data.augmentation is None else Augmenter(data.augmentation, seed)
        collator = _collator(data, images, packers, geometry.part, augmenter)
        weights, num_epochs = [corpus.weight for corpus in data.train], [corpus.epochs for corpus in data.train]
        self._mixture = Mixture(packers, weights, seed, data.packing, num_epochs, PlanStore(plan_folder))
        self._data, self._geometry = data, replace(geometry, skip_steps=data.skip_steps)
        self._microbatches = _Microbatches(self._mixture, self._geometry, collator)
        self._num_workers = data.num_workers if geometry.part.images else 0
        self.num_bad_images = 0
        """Pictures that did not decode and were replaced by a blank one so far (`on_bad_document: skip`)."""

    def steps(self, start: int, stop: int) -> Generator[list[MultimodalBatch]]:
        """Yield the microbatches of steps `start` … `stop` - 1, a list for each.

        Raises DataError, with shard, offset and document, for a picture that does not decode, unless
        `on_bad_document` is "skip", and before the first step where the data don't last until `stop`.
        """
        num_samples, size = self._mixture.blend.num_samples, self._geometry.global_batch_size
        if num_samples is not None and (data_step(stop - 1, self._data.skip_steps) + 1) * size > num_samples:
            raise DataError(
                f"every corpus of data.train has a number of epochs, and together they last for "
                f"{self._training_step(num_samples // size)} steps, not {stop}; give one of them more epochs, or none, "
                f"or take fewer steps"
            )
        for step in _read_steps(self._microbatches, range(start, stop), self._num_workers):
            for microbatch in step:
                self.num_bad_images += len(microbatch.bad_images)
            yield [microbatch.unwrap() for microbatch in step]

    def origins(self, step: int) -> list[dict[str, Any]]:
        """Return, for each sample of all ranks in `step`: its global index, and the corpus and documents it is of."""
        first = data_step(step, self._data.skip_steps) * self._geometry.global_batch_size
        return [self._mixture.origin(index) for index in range(first, first + self._geometry.global_batch_size)]

    @property
    def mixture(self) -> Mixture:
        """The samples by their global index."""
        return self._mixture

    def packing_report(self) -> PackingReport:
        """Return how well the first epoch of each corpus is packed, and when corpora end. Plans what is not planned."""
        ends = {
            corpus: self._training_step(sample // self._geometry.global_batch_size)
            for corpus, sample in self._mixture.blend.ends.items()
        }
        return PackingReport(
            self._data.packing,
            self._data.sequence_length,
            [
                CorpusPacking(str(corpus.prefix), corpus.weight, summary, ends.get(number))
                for number, (corpus, summary) in enumerate(
                    zip(self._data.train, self._mixture.summaries(), strict=True)
                )
            ],
        )

    def _training_step(self, step: int) -> int:
        """Return how many training steps the first `step` steps of the data are."""
        return step - sum(max(0, min(step, last) - first + 1) for first, last in self._data.skip_steps)


def heldout_batches(
    data: DataConfig,
    corpus: CorpusConfig,
    images: ImageFormat,
    geometry: BatchGeometry,
    num_sequences: int,
    plan_folder: Path | None = None,
) -> Generator[list[MultimodalBatch]]:
    """Yield the first `num_sequences` rows of `corpus`, or all if it has fewer, unshuffled, as `StepLoader.steps` does.

    Every rank gets the same number of microbatches: the last step is filled up with copies of the first row whose loss
    mask is false everywhere. `plan_folder` is that of the run, where what is held out is found. Raises DataError.
    """
    part = geometry.part
    packer = _open_packer(data, corpus, images, part, ("heldout", plan_folder))
    rows = _HeldoutRows(packer, num_sequences)
    num_steps = -(-len(rows) // geometry.global_batch_size)
    microbatches = _Microbatches(rows, geometry, _collator(data, images, [packer], part))
    for step in _read_steps(microbatches, range(num_steps), data.num_workers if part.images else 0):
        yield [microbatch.unwrap() for microbatch in step]


def check_heldout(data: DataConfig, images: ImageFormat, plan_folder: Path | None = None) -> None:
    """Raise DataError, rather than at the first evaluation, for a held-out corpus that has nothing to evaluate on."""
    for corpus in data.heldout:
        _open_packer(data, corpus, images, RankPart(), ("heldout", plan_folder))


def heldout_captions(
    data: DataConfig, corpus: CorpusConfig, n: int, plan_folder: Path | None = None
) -> list[tuple[Image.Image, str]]:
    """Return the first `n` pictures of a caption corpus, or all if it has fewer, each with its caption.

    Raises DataError for a corpus of another kind and for a picture that does not decode.
    """
    tokenizer = KosmosTokenizer.load(data.tokenizer)
    opened = Corpus(corpus, tokenizer)
    if opened.images is None or opened.kind != "caption":
        raise DataError(f"{corpus.prefix} holds {opened.kind} documents; captions need a corpus of kind: caption")
    pairs = []
    documents = documents_of(opened, corpus, "heldout", plan_folder)
    for document in range(len(opened))[:n] if documents is None else documents[:n].tolist():
        (image,) = opened.images_of(document)
        try:
            picture = decode_image(opened.images.read(image))
        except DataError as error:
            raise DataError(f"{opened.images.locate(image)}: {error}") from error
        pairs.append((picture, tokenizer.decode(opened.tokens(document))))
    return pairs


class _HeldoutRows:
    """The rows of one corpus in the order of its documents; beyond them copies of the first that don't count."""

    def __init__(self, packer: Packer, num_sequences: int) -> None:
        self._packer = packer
        self._plan = packer.plan(packer.documents)
        self._num_rows = min(num_sequences, self._plan.num_rows)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Sample:
        if index < self._num_rows:
            return Sample(0, self._packer.row(self._plan, index), index)
        return Sample(0, self._packer.row(self._plan, 0).without_targets(), index)


class _Microbatches(Dataset[Microbatch]):
    """The microbatches of one rank, counted from the first step on."""

    def __init__(self, samples: Samples, geometry: BatchGeometry, collator: Collator) -> None:
        self._samples, self.geometry, self._collator = samples, geometry, collator

    def __getitem__(self, number: int) -> Microbatch:
        try:
            return self._collator([self._samples[index] for index in self.geometry.samples(number)])
        except DataError as error:  # as a value: the loader's own way buries it in a worker's traceback
            return Microbatch(failure=str(error))


def _read_steps(microbatches: _Microbatches, steps: range, num_workers: int) -> Iterator[list[Microbatch]]:
    """Yield the microbatches of each step, read ahead by `num_workers` processes."""
    per_step = microbatches.geometry.num_microbatches
    loader = DataLoader(
        microbatches,
        batch_size=None,
        sampler=range(steps.start * per_step, steps.stop * per_step),
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=partial(end_with_parent, os.getpid()),
        collate_fn=_unchanged,
        # Workers share the opened corpora with this process and touch neither CUDA nor collectives.
        multiprocessing_context="fork" if num_workers else None,
    )
    step: list[Microbatch] = []
    for microbatch in loader:
        for problem in microbatch.bad_images:
            logger.warning("a picture is shown blank: %s", problem)
        step.append(microbatch)
        if len(step) == per_step:
            yield step
            step = []


def _unchanged(microbatch: Any) -> Any:
    return microbatch


def _open_packer(
    data: DataConfig, config: CorpusConfig, images: ImageFormat, part: RankPart, split: tuple[Side, Path | None]
) -> Packer:
    """Open one side of a corpus; `split` has the folder where the documents of each side are kept, too."""
    tokenizer = KosmosTokenizer.load(data.tokenizer)
    row_format = RowFormat(sequence_length=data.sequence_length, num_latents=images.num_latents)
    corpus = Corpus(config, tokenizer)
    documents = documents_of(corpus, config, *split)
    packer = Packer(corpus, row_format, tokenizer, data.on_bad_document == "skip", documents, part.tokens)
    if packer.num_misfits:
        logger.warning(
            "%s: %d documents have too many pictures for a row and are left out", config.prefix, packer.num_misfits
        )
    return packer


def _collator(
    data: DataConfig,
    images: ImageFormat,
    packers: Sequence[Packer],
    part: RankPart,
    augmenter: Augmenter | None = None,
) -> Collator:
    return Collator(
        [packer.corpus for packer in packers],
        images,
        part=part,
        stop_at_bad_image=data.on_bad_document == "error",
        mask_documents=data.document_mask,
        augmenter=augmenter,
    )
