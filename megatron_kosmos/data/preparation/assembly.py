"""Assembly: all parts of a job become a corpus, in steps that a killed process leaves for the next one to go on with.

What has to be written is written inside the folder of the parts and gets its name there at once (`build`). After that,
files are only renamed, the manifest last (`publish`): all of it can be done again, wherever it stopped.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.corpora.hashed_file import HashedFile, fsync_folder, told_when_full
from megatron_kosmos.data.corpora.image_store import INDEX_SUFFIX, shard_suffix
from megatron_kosmos.data.corpora.indexed import token_dtype, write_index
from megatron_kosmos.data.corpora.manifest import (
    QUARANTINE_SUFFIX,
    SUFFIX,
    FileRecord,
    Job,
    Manifest,
    as_file,
    check_size,
    is_file_of,
    path_with,
)
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.packing.planning import ImagePlaces
from megatron_kosmos.data.packing.summary import PackingSummary, summarize_packing
from megatron_kosmos.data.preparation.duplicates import Unique
from megatron_kosmos.data.preparation.image_writing import write_image_index
from megatron_kosmos.data.preparation.part import Part, read_record
from megatron_kosmos.data.preparation.parts_folder import PartsFolder, own_name, put_in_place, remove_leftovers
from megatron_kosmos.data.preparation.tables import Tables

ASSEMBLED = "assembled"
MANIFEST = "manifest.json"
REPLACED = "replaced.json"
"""The manifest of the corpus that was there before, as long as files of it may be."""


class NothingLeft(DataError):
    """Of all the inputs, no document is left."""


def assemble(folder: PartsFolder, job: Job, num_parts: int) -> None:
    """Make the corpus of all parts, in place of one that may be there.

    Raises DataError for a damaged part or a full disk. Without any document, deletes the parts and raises NothingLeft.
    """
    if not is_built(folder):
        try:
            build(folder, job, num_parts)
        except NothingLeft:
            folder.discard()
            raise
    publish(folder, num_parts)


def is_built(folder: PartsFolder) -> bool:
    """Return whether all that is left to do is `publish`."""
    return (folder.path / ASSEMBLED).is_dir()


def is_published(folder: PartsFolder) -> bool:
    """Return whether a process was killed when all that was left to do was to delete the parts."""
    return is_built(folder) and not (folder.path / ASSEMBLED / MANIFEST).exists()


def build(folder: PartsFolder, job: Job, num_parts: int) -> None:
    """Write all files of the corpus but its tars into the folder of the parts. Raises DataError and NothingLeft."""
    assembled = folder.path / ASSEMBLED
    remove_leftovers(assembled)
    corpus = _Corpus(job, [Part(folder.part_path(number)) for number in range(num_parts)])
    if corpus.documents == 0:
        first = next(filter(None, (part.first_bad() for part in corpus.parts)), None)
        left_out = corpus.count("skipped") | corpus.count("filtered")
        raise NothingLeft(
            f"no document left for {folder.prefix}: {left_out or 'the inputs are empty'}"
            + (f"; the first: {first}" if first else "")
        )
    writer = _Writer(own_name(assembled), folder.prefix.name)
    try:
        _write(corpus, writer, folder.prefix)
        put_in_place(writer.folder, assembled)
    finally:
        writer.abandon()


def publish(folder: PartsFolder, num_parts: int) -> None:
    """Give all files their names, the manifest last, and delete the parts. Raises DataError when a file is gone."""
    assembled, parent = folder.path / ASSEMBLED, folder.prefix.parent
    if not is_published(folder):
        manifest = Manifest.model_validate_json((assembled / MANIFEST).read_bytes())
        _delete_replaced(folder)
        tars = [path / tar for path in map(folder.part_path, range(num_parts)) for tar in read_record(path).tars]
        sources = {shard_name(folder.prefix, number): tar for number, tar in enumerate(tars)}
        for name, record in manifest.files.items():
            with suppress(FileNotFoundError):  # renamed already, by a process that was killed then
                sources.get(name, assembled / name).rename(parent / name)
            check_size(parent / name, record.bytes)
        fsync_folder(parent)
        (assembled / MANIFEST).rename(path_with(folder.prefix, SUFFIX))
        fsync_folder(parent)
    folder.discard()


def give_up(folder: PartsFolder) -> None:
    """Delete the parts, and what a killed process published of them or left of a corpus before."""
    unfinished = folder.path / ASSEMBLED / MANIFEST
    if unfinished.exists() and not path_with(folder.prefix, SUFFIX).exists():
        for manifest in (unfinished, folder.path / REPLACED):
            _delete_files_of(manifest, folder.prefix)
    folder.discard()


def shard_name(prefix: Path, number: int) -> str:
    """Return the name of a shard of pictures."""
    return f"{prefix.name}{shard_suffix(number)}"


class _Corpus:
    """All parts as one, without duplicates where these are not wanted."""

    def __init__(self, job: Job, parts: Sequence[Part]) -> None:
        self.job, self.parts = job, parts
        self.unique = Unique(parts, job.settings.filters)
        self.dtype = token_dtype(job.vocab_size)
        self.documents = self.images = self.tokens = self.max_images = 0
        for tables in self.tables():
            self.documents += len(tables.documents)
            self.images += len(tables.images)
            self.tokens += int(tables.documents["tokens"].sum(dtype=np.int64))
            self.max_images = max(self.max_images, int(tables.documents["images"].max(initial=0)))

    def tables(self) -> Iterator[Tables]:
        """Yield what is left of each part, with the numbers of shards in place of those of the part's tars."""
        num_tars = 0
        for number, part in enumerate(self.parts):
            tables = part.tables().only(*self.unique.of(number))
            tables.images["tar"] += num_tars
            num_tars += len(part.record.tars)
            yield tables

    def lengths(self) -> Iterator[NDArray[Any]]:
        """Yield the numbers of tokens of the documents, part by part."""
        return (tables.documents["tokens"] for tables in self.tables())

    def tokens_left(self) -> Iterator[NDArray[Any]]:
        """Yield the tokens, some at a time."""
        for number, part in enumerate(self.parts):
            documents, images = self.unique.of(number)
            tables = part.tables()
            for block, its_images, tokens in part.blocks(self.dtype):
                stay = documents[block], images[its_images]
                if all(map(np.all, stay)):
                    yield tokens
                else:
                    yield tokens[Tables(tables.documents[block], tables.images[its_images]).tokens_of_only(*stay)]

    def count(self, what: Literal["skipped", "filtered", "dropped_images"]) -> dict[str, int]:
        """Return the sum of one of the parts' accounts, with the duplicates."""
        counts = Counter(getattr(self.unique, what, {}))
        for part in self.parts:
            counts.update(getattr(part.record, what))
        return dict(sorted((+counts).items()))

    def packing(self) -> dict[Packing, PackingSummary]:
        """Return how the documents fill rows."""
        num_images = np.concatenate([tables.documents["images"] for tables in self.tables()])
        positions = np.concatenate([tables.images["position"] for tables in self.tables()])
        places = ImagePlaces(np.append(0, np.cumsum(num_images, dtype=np.int64)), positions) if self.images else None
        lengths = np.concatenate(list(self.lengths()))
        return summarize_packing(self.job.kind, lengths, places, self.job.settings.row_format)


class _Writer:
    """Writes the files of a corpus into a folder of their own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._name = folder, name
        with told_when_full(folder):
            folder.mkdir()
        self.records = dict[str, FileRecord]()

    @contextmanager
    def file(self, suffix: str) -> Iterator[HashedFile]:
        """Give a file of the corpus to write; it is on disk after the block. Raises DataError when that is full."""
        file = HashedFile(self.folder / f"{self._name}{suffix}")
        try:
            yield file
            self.records[file.path.name] = file.close()
        finally:
            file.abandon()

    def manifest(self, manifest: Manifest) -> None:
        """Write the manifest, under a name of its own until all files have theirs."""
        file = HashedFile(self.folder / MANIFEST)
        file.write(as_file(manifest))
        file.close()
        fsync_folder(self.folder)

    def abandon(self) -> None:
        """Delete the folder unless it has got its name."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(corpus: _Corpus, writer: _Writer, prefix: Path) -> None:
    job = corpus.job
    with writer.file(".bin") as file:
        for tokens in corpus.tokens_left():
            file.write(tokens.tobytes())
    with writer.file(".idx") as file:
        write_index(file, corpus.dtype, corpus.documents, corpus.lengths)
    if job.kind != "text":
        with writer.file(INDEX_SUFFIX) as file:
            write_image_index(file, corpus.documents, corpus.images, corpus.tables)
    skipped = corpus.count("skipped")
    if skipped:
        with writer.file(QUARANTINE_SUFFIX) as file:
            for part in corpus.parts:
                file.write(part.quarantine())
    tars = [part.record.files[tar] for part in corpus.parts for tar in part.record.tars]
    writer.manifest(
        Manifest(
            **dict(job),
            documents=corpus.documents,
            tokens=corpus.tokens,
            images=corpus.images,
            max_images_per_document=corpus.max_images,
            skipped=skipped,
            filtered=corpus.count("filtered"),
            dropped_images=corpus.count("dropped_images"),
            packing=corpus.packing(),
            files=writer.records | {shard_name(prefix, number): record for number, record in enumerate(tars)},
        )
    )


def _delete_replaced(folder: PartsFolder) -> None:
    """Delete the corpus that is in the way; its manifest goes first, so that what is left is not taken for a corpus."""
    manifest, replaced = path_with(folder.prefix, SUFFIX), folder.path / REPLACED
    if manifest.exists():
        manifest.rename(replaced)
    if replaced.exists():
        _delete_files_of(replaced, folder.prefix)
        replaced.unlink()


def _delete_files_of(manifest: Path, prefix: Path) -> None:
    try:
        names = list(Manifest.model_validate_json(manifest.read_bytes()).files)
    except (FileNotFoundError, ValidationError):
        return  # damaged: those of its files that the new corpus has too are overwritten
    for name in names:
        if is_file_of(prefix, name):
            (prefix.parent / name).unlink(missing_ok=True)
