"""How fast does text become tokens? Compares `kosmos preprocess text` with Megatron-LM's way of doing it.

    .venv/bin/python benchmarks/text_preprocessing.py --input DATA/*.jsonl --tokenizer data/tokenizer

Both ways prepare the same lines of JSON with the same sentencepiece tokenizer, the same number of workers and the same
`<s>`, `</s>` and `</line>`; files that are not the same to the byte end the benchmark. They take turns. A turn has
processes of its own; its CPU-seconds are those of all of them but for the imports of the first, of which Megatron has
more. Writes results/text_preprocessing.json.
"""

import ctypes
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import file_digest
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import sentencepiece
import typer
from rich.console import Console
from rich.table import Table

from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import path_with
from megatron_kosmos.data.tokenization.settings import MODEL_FILES
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

RESULTS = Path(__file__).parent / "results" / "text_preprocessing.json"
Way = Literal["kosmos", "megatron"]
LINES_AT_A_TIME = 32
"""Lines that a worker of Megatron-LM takes."""
PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl: processes whose parent has ended become ours."""


def main(  # noqa: PLR0913, PLR0917 - a command's parameters are its options
    inputs: Annotated[list[Path], typer.Option("--input", help='.jsonl files with {"text": …} a line.')],
    tokenizer: Annotated[Path, typer.Option(help="Folder of a sentencepiece tokenizer of ours, newlines as </line>.")],
    more_inputs: Annotated[list[Path] | None, typer.Argument(help="More inputs.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes beside the one that writes.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 3,
    turn_of: Annotated[Way | None, typer.Option(hidden=True, help="Be the process of one turn of this way.")] = None,
    output: Annotated[Path | None, typer.Option(hidden=True, help="Prefix of the files of the turn.")] = None,
) -> None:
    """Let the ways take turns, compare their files, print a table and write it."""
    files = (*inputs, *(more_inputs or ()))
    if turn_of is not None and output is not None:
        take_turn(turn_of, (files, tokenizer, output, workers))
        return
    adopt_orphans()
    seconds: dict[Way, list[tuple[float, float]]] = {way: [] for way in get_args(Way)}
    with tempfile.TemporaryDirectory() as folder:
        prefixes = {way: Path(folder) / way for way in seconds}
        for _ in range(turns):
            for way, prefix in prefixes.items():
                options = ["--tokenizer", tokenizer, "--turn-of", way, "--output", prefix, "--workers", workers]
                command = [sys.executable, __file__, "--input", *files, *options]
                seconds[way].append(measure(list(map(str, command))))
            digests = {way: digests_at(prefix) for way, prefix in prefixes.items()}
            if len({*digests.values()}) != 1:
                sys.exit(f"the files differ (sha256 of .bin and .idx): {digests}")
        lengths = IndexedReader(prefixes["kosmos"]).lengths
        report(files, (len(lengths), int(lengths.sum(dtype="int64"))), seconds)


def take_turn(way: Way, arguments: tuple[tuple[Path, ...], Path, Path, int]) -> None:
    """Prepare the files; print the CPU-seconds before, of imports, and the seconds that it took."""
    if way == "kosmos":
        from megatron_kosmos.data.preparation.preprocess import prepare  # noqa: F401 - not counted
    else:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: F401 - not counted
    imports, started = time.process_time(), time.perf_counter()
    (prepare_with_kosmos if way == "kosmos" else prepare_with_megatron)(*arguments)
    print(json.dumps({"imports": imports, "seconds": time.perf_counter() - started}))


def report(files: tuple[Path, ...], counts: tuple[int, int], seconds: dict[Way, list[tuple[float, float]]]) -> None:
    """Print the table and write the results; `counts` are those of documents and tokens."""
    num_documents, num_tokens = counts
    megabytes = sum(len(json.loads(line)["text"].encode()) for file in files for line in file.open("rb")) / 1e6
    medians = {
        way: [statistics.median(column) for column in zip(*turns, strict=True)] for way, turns in seconds.items()
    }
    table = Table(
        *("way", "CPU-seconds", "seconds", "text MB per CPU-second", "tokens per CPU-second", "ratio"),
        title=f"{megabytes:.1f} MB of text, {num_documents:,} documents, {num_tokens:,} tokens; files are the same",
    )
    rows: list[dict[str, Any]] = []
    for way, (cpu, wall) in medians.items():
        row = {
            "way": way,
            "cpu_seconds": cpu,
            "seconds": wall,
            "megabytes_per_cpu_second": megabytes / cpu,
            "tokens_per_cpu_second": num_tokens / cpu,
            "ratio": medians["megatron"][0] / cpu,
            "turns": seconds[way],
        }
        rows.append(row)
        rates = f"{megabytes / cpu:.2f}", f"{num_tokens / cpu:,.0f}", f"{row['ratio']:.2f}"
        table.add_row(way, f"{cpu:.2f}", f"{wall:.2f}", *rates)
    Console().print(table)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    libraries = f"sentencepiece {sentencepiece.__version__}"
    corpus = {"megabytes": megabytes, "documents": num_documents, "tokens": num_tokens}
    result = {"machine": machine, "libraries": libraries, "corpus": corpus, "text_preprocessing": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def prepare_with_kosmos(files: tuple[Path, ...], tokenizer: Path, output: Path, workers: int) -> None:
    """Prepare as `kosmos preprocess text` does."""
    from megatron_kosmos.data.preparation.preprocess import Preparation, prepare

    prepare(Preparation("text", files, output, tokenizer, num_workers=workers, overwrite=True))


def prepare_with_megatron(files: tuple[Path, ...], tokenizer: Path, output: Path, workers: int) -> None:
    """Prepare as tools/preprocess_data.py of Megatron-LM (core 0.16) does, but with `<s>` and with all files at once.

    Its Partition.process_json_file: lines of a text file through a pool's imap, a list of ids back for each, and
    megatron-core's builder, which turns each list into an array.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = MegatronEncoder(tokenizer)
    pool = multiprocessing.Pool(workers, initializer=encoder.initializer)
    lines = chain.from_iterable(file.open(encoding="utf-8") for file in files)
    dtype = DType.optimal_dtype(KosmosTokenizer.load(tokenizer).vocab_size)
    builder = IndexedDatasetBuilder(str(path_with(output, ".bin")), dtype=dtype)
    for document, lengths, _ in pool.imap(encoder.encode, lines, LINES_AT_A_TIME):
        builder.add_document(document["text"], lengths["text"])
    builder.finalize(str(path_with(output, ".idx")))
    pool.close()
    pool.join()


class MegatronEncoder:
    """Its Encoder, for one key."""

    tokenizer: "LineTokenizer"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def initializer(self) -> None:
        MegatronEncoder.tokenizer = LineTokenizer(self.folder)

    def encode(self, json_line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        data = json.loads(json_line)
        ids, lens = {}, {}
        for key in ("text",):
            doc_ids = [MegatronEncoder.tokenizer.bos]
            doc_ids.extend(MegatronEncoder.tokenizer.tokenize(data[key]))
            doc_ids.append(MegatronEncoder.tokenizer.eod)
            ids[key] = doc_ids
            lens[key] = [len(doc_ids)]
        return ids, lens, len(json_line)


class LineTokenizer:
    """Sentencepiece as it is, and `</line>` between lines."""

    def __init__(self, folder: Path) -> None:
        settings = KosmosTokenizer.load(folder)
        if settings.line_id is None:
            sys.exit("the benchmark needs a tokenizer that writes newlines as </line>")
        self.bos, self.eod, self.line = settings.bos_id, settings.eos_id, settings.line_id
        self.pieces = sentencepiece.SentencePieceProcessor(str(folder / MODEL_FILES["sentencepiece"]))

    def tokenize(self, text: str) -> list[int]:
        first, *rest = text.split("\n")
        ids = self.pieces.encode_as_ids(first)
        for line in rest:
            ids.append(self.line)
            ids.extend(self.pieces.encode_as_ids(line))
        return ids


def measure(command: list[str]) -> tuple[float, float]:
    """Run the process of a turn; return CPU-seconds and seconds, both without its imports.

    Processes that outlive their parent, as the server of a pool does, are waited for and counted, too.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_seconds - said["imports"], said["seconds"]


def adopt_orphans() -> None:
    """Make processes whose parent ends children of this one, so that their CPU-seconds are counted (Linux)."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def digests_at(prefix: Path) -> tuple[str, ...]:
    """Return the sha256 of tokens and index."""
    digests = []
    for suffix in (".bin", ".idx"):
        with path_with(prefix, suffix).open("rb") as file:
            digests.append(file_digest(file, "sha256").hexdigest())
    return tuple(digests)


if __name__ == "__main__":
    typer.run(main)
