"""The manifest of a prepared corpus: `PREFIX.manifest.json`, written last, so that a corpus exists when it does."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.input_format import InputFormat
from megatron_kosmos.data.packing_summary import PackingSummary
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.prompt import SourceKind

SUFFIX = ".manifest.json"


class FileRecord(StrictModel):
    """Size and content of one file."""

    bytes: NonNegativeInt
    sha256: str


class PreparationSettings(StrictModel):
    """The choices that made the corpus."""

    on_bad: Literal["error", "skip"]
    filters: Filters
    row_format: RowFormat
    max_shard_bytes: PositiveInt
    input_format: InputFormat = InputFormat()
    """Corpora that were prepared before it existed have the usual one."""


class Manifest(StrictModel):
    """What a prepared corpus is, how it came about, and how to tell whether it is whole."""

    format: Literal[1] = 1
    kind: SourceKind
    documents: PositiveInt
    tokens: PositiveInt
    """On disk: a picture counts two, its slots are not there yet."""
    images: NonNegativeInt
    max_images_per_document: NonNegativeInt
    skipped: dict[str, NonNegativeInt]
    """Documents that could not be used, by reason; `PREFIX.skipped.jsonl` lists them."""
    filtered: dict[str, NonNegativeInt]
    """Documents that a filter dropped, by filter; `not_downloaded`: listed by img2dataset as failed."""
    dropped_images: dict[str, NonNegativeInt]
    """Pictures that a filter dropped from documents, by filter."""
    packing: dict[Packing, PackingSummary] = Field(default_factory=dict)
    """What each way of packing makes of an epoch, in rows of `settings.row_format`; none in older manifests."""
    vocab_size: PositiveInt
    tokenizer_fingerprint: str
    sources: tuple[str, ...]
    """The input files, as they were named."""
    settings: PreparationSettings
    files: dict[str, FileRecord]
    """Every file of the corpus but this one, by name."""


def path_with(prefix: Path, suffix: str) -> Path:
    """Return `PREFIX<suffix>`."""
    return prefix.with_name(prefix.name + suffix)


def read_manifest(prefix: Path) -> Manifest:
    """Read `PREFIX.manifest.json` and compare the size of every file it names. Raises DataError."""
    path = path_with(prefix, SUFFIX)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"no prepared corpus at {prefix}: {path.name} is missing; write it with tools/preprocess_data.py"
        ) from error
    except ValidationError as error:
        raise DataError(f"{path} is damaged; prepare the corpus again: {error}") from error
    for name, record in manifest.files.items():
        check_size(prefix.parent / name, record.bytes)
    return manifest


def write_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as the content of its file."""
    return (json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


def check_size(file: Path, expected: int) -> None:
    """Raise DataError unless `file` has `expected` bytes."""
    try:
        actual = file.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing, though its manifest names it; prepare the corpus again") from error
    if actual != expected:
        what = "truncated" if actual < expected else "longer than it was"
        raise DataError(f"{file} is {what}: {actual} bytes, expected {expected}; copy or prepare the corpus again")
