"""Where the tokens come from: tokenizer, prepared corpora and their weights."""

from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.prompt import SourceKind


class CorpusConfig(StrictModel):
    """One corpus that `tools/preprocess_data.py` wrote."""

    kind: SourceKind
    prefix: Path
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.manifest.json` are the files."""
    weight: PositiveFloat = 1.0
    """Share of the training tokens, relative to the other corpora."""


class DataConfig(StrictModel):
    """The blend and how it is read."""

    tokenizer: Path
    """Folder that `kosmos tokenizer train` or `kosmos tokenizer import` wrote."""
    sequence_length: PositiveInt
    """T, tokens of a packed sequence, image slots included."""
    train: tuple[CorpusConfig, ...]
    heldout: tuple[CorpusConfig, ...] = ()
    """Corpora for evaluation; no document of theirs may occur in `train`."""
    document_mask: bool = False
    """Keep attention within each document of a packed sequence and count its positions from 0. The paper packs plainly:
    false."""
    num_workers: NonNegativeInt = 2
    """Processes that decode images, on ranks that hold the vision tower; 0 decodes in the training process."""
    on_bad_document: Literal["error", "skip"] = "error"
    """What to do with a picture that does not decode at training time: stop, or count it and show a blank one."""

    @model_validator(mode="after")
    def _has_a_corpus(self) -> Self:
        if not self.train:
            raise ValueError("train is empty; name at least one corpus")
        return self
