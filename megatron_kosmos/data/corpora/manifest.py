"""The manifest of a prepared corpus: `PREFIX.manifest.json`, written last, so that a corpus exists when it does."""

import json
from collections.abc import Collection
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.packing.summary import PackingSummary
from megatron_kosmos.data.sources.input_format import InputFormat
from megatron_kosmos.prompt import SourceKind

SUFFIX = ".manifest.json"
QUARANTINE_SUFFIX = ".quarantine.jsonl"
MAX_TOLD = 5
"""Differences between jobs that a message lists."""


class FileRecord(StrictModel):
    """Size and content of one file."""

    bytes: NonNegativeInt
    sha256: str


class PreparationSettings(StrictModel):
    """The choices that made the corpus."""

    filters: Filters
    row_format: RowFormat
    max_shard_bytes: PositiveInt
    input_format: InputFormat = InputFormat()
    """Corpora that were prepared before it existed have the usual one."""
    part_bytes: PositiveInt | None = None
    """Size of the parts in which the inputs were prepared; None: the corpus is older than they are."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_was_once(cls, fields: Any) -> Any:
        """Older manifests say whether bad documents were left out or ended the preparation."""
        if isinstance(fields, dict):
            fields = {name: value for name, value in fields.items() if name != "on_bad"}
        return fields


class Job(StrictModel):
    """Everything that a prepared corpus depends on, but for the contents of its inputs."""

    format: Literal[1] = 1
    kind: SourceKind
    sources: tuple[str, ...]
    """The input files, as they were named."""
    source_bytes: tuple[NonNegativeInt, ...] = ()
    """Their sizes; none where the corpus was prepared before they were recorded."""
    vocab_size: PositiveInt
    tokenizer_fingerprint: str
    settings: PreparationSettings

    def differences(self, other: "Job") -> str:
        """Return which fields of `other` differ and how, for a person; empty when none do."""
        ours, theirs = (_flat(job.model_dump(include=set(Job.model_fields))) for job in (self, other))
        changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        told = [f"{name} was {ours.get(name)!r}, is {theirs.get(name)!r}" for name in changed[:MAX_TOLD]]
        return "; ".join(told) + (f"; and {len(changed) - MAX_TOLD} more" if len(changed) > MAX_TOLD else "")


class Manifest(Job):
    """What a prepared corpus is, how it came about, and how to tell whether it is whole."""

    documents: PositiveInt
    tokens: PositiveInt
    """On disk: a picture counts two, its slots are not there yet."""
    images: NonNegativeInt
    max_images_per_document: NonNegativeInt
    skipped: dict[str, NonNegativeInt]
    """Documents that could not be used, by reason; `PREFIX.quarantine.jsonl` lists them."""
    filtered: dict[str, NonNegativeInt]
    """Documents that a filter dropped, by filter; `not_downloaded`: listed by img2dataset as failed."""
    dropped_images: dict[str, NonNegativeInt]
    """Pictures that a filter dropped from documents, by filter."""
    packing: dict[Packing, PackingSummary] = Field(default_factory=dict)
    """What each way of packing makes of an epoch, in rows of `settings.row_format`; none in older manifests."""
    files: dict[str, FileRecord]
    """Every file of the corpus but this one, by name."""


def path_with(prefix: Path, suffix: str) -> Path:
    """Return `PREFIX<suffix>`."""
    return prefix.with_name(prefix.name + suffix)


def read_manifest(prefix: Path) -> Manifest:
    """Read `PREFIX.manifest.json` and compare the size of every file it names. Raises DataError."""
    path = path_with(prefix, SUFFIX)
    try:
        if not S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is no file, but a folder, device or pipe")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"no prepared corpus at {prefix}: {path.name} is missing; write it with tools/preprocess_data.py"
        ) from error
    except ValidationError as error:
        raise DataError(f"{path} is damaged; prepare the corpus again: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    _check_names(path, prefix, manifest.files)
    for name, record in manifest.files.items():
        check_size(prefix.parent / name, record.bytes)
    return manifest


def as_file(model: StrictModel) -> bytes:
    """Return a manifest, or another such record, as the content of its file."""
    return (json.dumps(model.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


def is_file_of(prefix: Path, name: str) -> bool:
    """Return whether `name` is one that a file of the corpus at `prefix` can have."""
    suffix = name.removeprefix(prefix.name)
    return suffix != name and suffix.startswith((".", "-images-")) and "/" not in name and "\0" not in name


def _check_names(path: Path, prefix: Path, names: Collection[str]) -> None:
    """Raise DataError unless these are files of `prefix`: others would be read, and deleted with the corpus."""
    for name in names:
        if not is_file_of(prefix, name):
            raise DataError(f"{path} names {name!r}, which is no file of this corpus; prepare the corpus again")
    for suffix in (".bin", ".idx"):
        if prefix.name + suffix not in names:
            raise DataError(f"{path} does not name {prefix.name}{suffix}; prepare the corpus again")


def check_size(file: Path, expected: int) -> None:
    """Raise DataError unless `file` has `expected` bytes."""
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing, though its manifest names it; prepare the corpus again") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if not S_ISREG(status.st_mode):
        raise DataError(f"{file} is no file, but a folder, device or pipe")
    actual = status.st_size
    if actual != expected:
        what = "truncated" if actual < expected else "longer than it was"
        raise DataError(f"{file} is {what}: {actual} bytes, expected {expected}; copy or prepare the corpus again")


def _flat(fields: Any, name: str = "") -> dict[str, Any]:
    """Return the values in nested dictionaries and tuples by name, such as `settings.filters.max_images`."""
    if isinstance(fields, dict):
        inside = [(f"{name}.{key}" if name else key, value) for key, value in fields.items()]
    elif isinstance(fields, tuple):
        inside = [(f"{name}[{number}]", value) for number, value in enumerate(fields)]
    else:
        return {name: fields}
    return {path: leaf for key, value in inside for path, leaf in _flat(value, key).items()}
