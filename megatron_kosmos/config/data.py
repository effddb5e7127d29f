"""Where the tokens come from: tokenizer, prepared corpora and their weights."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.prompt import SourceKind

Packing = Literal["concatenate", "best_fit", "best_fit_decreasing"]


class CorpusConfig(StrictModel):
    """One corpus that `tools/preprocess_data.py` wrote."""

    kind: SourceKind
    prefix: Path
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.manifest.json` are the files."""
    weight: PositiveFloat = 1.0
    """Share of the training tokens, relative to the other corpora."""
    epochs: PositiveInt | None = None
    """Training only: after so many passes the corpus ends, and its weight goes to the others of its kind, in proportion
    to theirs; to all others when it was the last of its kind. Null: no end."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the documents, chosen by a hash of their tokens, that is held out: `train` leaves them out, and an entry
    of the same prefix in `heldout` has nothing else. Null: the whole corpus, in either list."""


class AugmentationConfig(StrictModel):
    """Random parts of the pictures in training: a rectangle, stretched to the model's square, perhaps mirrored.

    The defaults are OpenCLIP's: torchvision's RandomResizedCrop with its aspect ratios and 90 to 100% of the area, and
    no flips. CLIP itself takes random squares (arXiv 2103.00020, section 2.4).
    """

    scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Least and most area of the rectangle, as a share of the picture's."""
    aspect_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Least and most width of the rectangle, as a multiple of its height."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How often a picture is mirrored left to right. Captions that speak of left and right, or of writing, then lie."""

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for name in ("scale", "aspect_ratio"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"{name}=[{least}, {most}] must be [least, most]")
        if self.scale[1] > 1:
            raise ValueError(f"scale=[{self.scale[0]}, {self.scale[1]}] is more than the picture; 1.0 is the most")
        return self


class DataConfig(StrictModel):
    """The blend and how it is read."""

    tokenizer: Path
    """Folder that `kosmos tokenizer train` or `kosmos tokenizer import` wrote."""
    sequence_length: PositiveInt
    """T, tokens of a packed sequence, image slots included."""
    train: tuple[CorpusConfig, ...]
    heldout: tuple[CorpusConfig, ...] = ()
    """Corpora for evaluation; no document of theirs may occur in `train`."""
    packing: Packing = "concatenate"
    """How documents of `train` fill sequences. `concatenate`: one after the other, cut where a sequence is full (the
    paper's "full-sentence"). `best_fit`: whole, each into the fullest open sequence that it fits.
    `best_fit_decreasing`: whole, the longest of an epoch first, which leaves the least padding. `heldout` is always
    concatenated."""
    skip_steps: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Stretches `[first, last]` of the data that are passed over, in steps of a run that skips nothing, counted from 1;
    later samples move up. A run may be resumed with others as long as they lie behind its checkpoint."""
    document_mask: bool = False
    """Keep attention within each document of a packed sequence and count its positions from 0. The paper packs plainly:
    false."""
    augmentation: AugmentationConfig | None = None
    """Show random parts of the pictures of `train`; `{}` takes the defaults. Null: the middle square of each, as
    `heldout` always does."""
    num_workers: NonNegativeInt = 2
    """Processes that decode images, on ranks that hold the vision tower; 0 decodes in the training process."""
    on_bad_document: Literal["error", "skip"] = "error"
    """What to do with a picture that does not decode at training time: stop, or count it and show a blank one."""

    @model_validator(mode="after")
    def _has_a_corpus(self) -> Self:
        if not self.train:
            raise ValueError("train is empty; name at least one corpus")
        return self

    @model_validator(mode="after")
    def _heldout_corpora_have_one_epoch(self) -> Self:
        for number, corpus in enumerate(self.heldout):
            if corpus.epochs is not None:
                raise ValueError(f"heldout.{number}.epochs={corpus.epochs} does nothing: only train has epochs")
        return self

    @model_validator(mode="after")
    def _skipped_stretches_are_in_order(self) -> Self:
        end = 0
        for first, last in self.skip_steps:
            if not end < first <= last:
                raise ValueError(
                    f"skip_steps={[list(stretch) for stretch in self.skip_steps]} must be stretches [first, last], "
                    f"first <= last, each after the one before; [{first}, {last}] is not"
                )
            end = last
        return self


def join_stretches(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return `stretches` [first, last] in order, those that overlap as one: what `skip_steps` may be."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(stretches):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return tuple(joined)


def data_step(step: int, skip_steps: Sequence[Sequence[int]]) -> int:
    """Return which step's samples training step `step` takes when the stretches `skip_steps` are passed over.

    Both are counted from 0, stretches from 1.
    """
    for first, last in skip_steps:
        if step >= first - 1:
            step += last - first + 1
    return step
