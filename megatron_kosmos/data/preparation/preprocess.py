"""Preparing a corpus: source documents in, indexed binary, image shards and manifest out.

The inputs are cut into parts. Records are cut into chunks, worker processes encode chunks, this process writes them in
their order, part by part; at the end the parts become the corpus. So a preparation that was killed goes on after the
parts that are done, many processes may share the parts, and the output depends on neither, nor on the workers.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from megatron_kosmos.data.corpora.manifest import (
    QUARANTINE_SUFFIX,
    SUFFIX,
    Job,
    Manifest,
    PreparationSettings,
    path_with,
    read_manifest,
)
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.assembly import assemble, give_up, is_built, is_published
from megatron_kosmos.data.preparation.encoding import EncoderSettings
from megatron_kosmos.data.preparation.part import Part, read_quarantined
from megatron_kosmos.data.preparation.part_plan import PartPlan, default_part_bytes
from megatron_kosmos.data.preparation.parts_folder import JOB, PartsFolder
from megatron_kosmos.data.preparation.pool import PlacedChunk, encode_records
from megatron_kosmos.data.sources.documents import check_input
from megatron_kosmos.data.sources.input_format import InputFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind


@dataclass(frozen=True)
class Preparation:
    """A corpus to prepare."""

    kind: SourceKind
    inputs: tuple[Path, ...]
    output: Path
    """PREFIX of the files."""
    tokenizer: Path
    """Folder of a KosmosTokenizer."""
    num_workers: int = 1
    """Processes that encode; 1 encodes in this one."""
    strict: bool = False
    """Stop at the first document that cannot be used, instead of listing it in `PREFIX.quarantine.jsonl`."""
    filters: Filters = field(default_factory=Filters)
    row_format: RowFormat = field(default_factory=RowFormat)
    """What the pictures of one document must fit together."""
    input_format: InputFormat = field(default_factory=InputFormat)
    max_shard_bytes: int = 1 << 30
    """A shard that has as many is followed by another."""
    part_bytes: int | None = None
    """Bytes of input after which a part ends; None: as suits the inputs."""
    overwrite: bool = False
    """Replace a corpus, or the parts of another one, that are at `output` already."""

    def job(self) -> Job:
        """Return what the corpus will depend on. Raises DataError for inputs or a tokenizer that cannot be used."""
        for file in self.inputs:
            check_input(self.kind, file)
        if self.kind != "text" and (only_for_text := self.filters.only_for_text()):
            raise DataError(f"{', '.join(only_for_text)}: for text documents only, not for {self.kind} ones")
        tokenizer = KosmosTokenizer.load(self.tokenizer)
        return Job(
            kind=self.kind,
            sources=tuple(map(str, self.inputs)),
            source_bytes=tuple(file.stat().st_size for file in self.inputs),
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            settings=PreparationSettings(
                filters=self.filters,
                row_format=self.row_format,
                max_shard_bytes=self.max_shard_bytes,
                input_format=self.input_format,
                part_bytes=self.part_bytes or default_part_bytes(self.kind, self.inputs),
            ),
        )


Progress = Callable[[int, int, int], None]
"""Called with the bytes of input that are done, all of them, and the documents they gave. Those of earlier calls count;
not called where the corpus is finished already."""


def prepare(preparation: Preparation, on_progress: Progress = lambda done, total, documents: None) -> Manifest:
    """Write `PREFIX.bin`, `.idx`, `.manifest.json` and, with pictures, shards and their index; return the manifest.

    Does what is not done yet; a corpus that is finished stays as it is. Raises BadDocument for the first bad document
    if `strict`, and DataError for whatever else is wrong: then the parts that are finished stay for the next call.
    """
    job = preparation.job()
    folder = PartsFolder(preparation.output)
    if not _is_finished(preparation, job):
        _begin(preparation, job, may_discard=True)
        plan = plan_of(job)
        try:
            _write_parts(preparation, job, range(plan.num_parts), on_progress)
        except BaseException:
            if folder.is_unused():
                folder.discard()
            raise
        assemble(folder, job, plan.num_parts)
    return read_manifest(preparation.output)


def prepare_shard(
    preparation: Preparation, shard: int, num_shards: int, on_progress: Progress = lambda done, total, documents: None
) -> range:
    """Write one of `num_shards` shares of the parts, for `merge` to assemble; return the numbers of these parts.

    Raises as `prepare` does.
    """
    job = preparation.job()
    parts = plan_of(job).shard(shard, num_shards)
    if not _is_finished(preparation, job):
        _begin(preparation, job, may_discard=False)
        PartsFolder(preparation.output).note_shards(num_shards)
        _write_parts(preparation, job, parts, on_progress)
    return parts


def merge(output: Path, overwrite: bool = False) -> Manifest:
    """Make the corpus of the parts that the shards wrote; return its manifest.

    A corpus that was assembled already stays as it is. Raises DataError when parts are missing or damaged, and when
    another corpus is there and not to be overwritten.
    """
    folder = PartsFolder(output)
    folder.remove_discarded()
    job = folder.job()
    if job is not None:
        plan = plan_of(job)
        if not is_built(folder):
            _refuse_corpus(output, job, overwrite)
            _refuse_gaps(folder, plan)
        assemble(folder, job, plan.num_parts)
    elif not path_with(output, SUFFIX).exists():
        raise DataError(f"there are no parts at {folder.path}; write them with --shard-index and --num-shards")
    return read_manifest(output)


def plan_of(job: Job) -> PartPlan:
    """Return how the inputs of a job are cut into parts."""
    assert job.settings.part_bytes is not None, "jobs have it, only old manifests have not"
    return PartPlan(tuple(map(Path, job.sources)), job.source_bytes, job.settings.part_bytes)


def _is_finished(preparation: Preparation, job: Job) -> bool:
    """Return whether the corpus is there. Raises DataError when another one is and is not to be overwritten."""
    folder = PartsFolder(preparation.output)
    folder.remove_discarded()
    just_finished = is_published(folder)  # by a call that was killed, which may have been to overwrite an older corpus
    if just_finished:
        folder.discard()
    if not path_with(preparation.output, SUFFIX).exists() or (preparation.overwrite and not just_finished):
        return False
    manifest = read_manifest(preparation.output)
    if manifest.differences(job):
        _refuse_corpus(preparation.output, job, preparation.overwrite)
        return False
    if preparation.strict and manifest.skipped:
        with path_with(preparation.output, QUARANTINE_SUFFIX).open("rb") as file:
            raise read_quarantined(file.readline())
    return True


def _refuse_corpus(output: Path, job: Job, overwrite: bool) -> None:
    if path_with(output, SUFFIX).exists() and not overwrite:
        differences = read_manifest(output).differences(job) or "parts of it were prepared once more"
        raise DataError(
            f"there is a corpus at {output} already, another one: {differences}; give --overwrite to replace it"
        )


def _begin(preparation: Preparation, job: Job, may_discard: bool) -> None:
    """Make the folder of the parts or find that of the same job. Raises DataError when it is that of another one."""
    folder = PartsFolder(preparation.output)
    other = folder.job()
    if other is not None and other.differences(job) and preparation.overwrite and may_discard:
        give_up(folder)
        other = None
    if other is None:
        folder.create(job)
        other = folder.job()
    differences = other.differences(job) if other is not None else f"it has no {JOB}"
    if differences:
        raise DataError(
            f"the parts in {folder.path} are those of another preparation: {differences}; go on with its arguments, or "
            + ("give --overwrite to begin anew" if may_discard else "delete that folder")
        )


def _write_parts(preparation: Preparation, job: Job, numbers: range, on_progress: Progress) -> None:
    """Write the parts that are not there yet. Raises DataError, and BadDocument if `strict`."""
    folder, plan = PartsFolder(preparation.output), plan_of(job)
    if is_built(folder):
        return
    folder.clear(numbers)
    present = {number: Part(path) for number in numbers if (path := folder.part_path(number)).is_dir()}
    progress = _Progress(on_progress, plan, numbers)
    missing = frozenset(numbers) - present.keys()
    records = plan.read(job.kind, preparation.input_format, missing)
    settings = EncoderSettings(
        job.kind, preparation.tokenizer, preparation.filters, preparation.row_format, preparation.input_format
    )
    for number, part in present.items():
        progress.part(number, part.record.documents)
    with closing(encode_records(settings, records, preparation.num_workers)) as chunks:
        by_part = groupby(chunks, lambda chunk: chunk.part)
        ahead = None
        for number in numbers:
            if number in present:
                _stop_at(present[number].first_bad() if preparation.strict else None)
                continue
            ahead = ahead or next(by_part, None)
            with folder.writing(job, number) as writer:
                if ahead is not None and ahead[0] == number:
                    for chunk in ahead[1]:
                        _stop_at(next(iter(chunk.encoded.bad), None) if preparation.strict else None)
                        writer.append(chunk.encoded)
                        progress.chunk(chunk)
                    ahead = None
            progress.part(number)


def _stop_at(problem: BadDocument | None) -> None:
    if problem is not None:
        raise problem


class _Progress:
    """Counts the bytes and documents of some parts."""

    def __init__(self, on_progress: Progress, plan: PartPlan, numbers: range) -> None:
        self._on_progress, self._plan = on_progress, plan
        self._total = sum(map(plan.bytes_of, numbers))
        self._done = self._documents = 0

    def chunk(self, chunk: PlacedChunk) -> None:
        """Count a chunk of the part that is being written."""
        self._documents += chunk.encoded.num_documents
        in_part = chunk.end - self._plan.start_of(chunk.part)
        self._on_progress(self._done + in_part, self._total, self._documents)

    def part(self, number: int, documents: int = 0) -> None:
        """Count all bytes of a part, and documents of it that were not counted yet."""
        self._done += self._plan.bytes_of(number)
        self._documents += documents
        self._on_progress(self._done, self._total, self._documents)


def _refuse_gaps(folder: PartsFolder, plan: PartPlan) -> None:
    """Raise DataError, with what to do, unless all parts are there."""
    problems = {n: problem for n in range(plan.num_parts) if (problem := folder.problem_of(n)) is not None}
    if not problems:
        return
    first = next(iter(problems))
    todo = [
        f"--num-shards {num_shards} with --shard-index "
        + ",".join(str(n) for n in range(num_shards) if not problems.keys().isdisjoint(plan.shard(n, num_shards)))
        for num_shards in folder.shards()
    ]
    raise DataError(
        f"{len(problems)} of the {plan.num_parts} parts in {folder.path} are not there: {_ranges(list(problems))} "
        f"(part {first}: {problems[first]}); run again "
        + (" or ".join(todo) if todo else "the command that they are of")
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as `0, 3-5`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
