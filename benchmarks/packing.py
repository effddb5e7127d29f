"""How full do sequences get, and what does planning cost? Measures data.packing and writes results/packing.json.

    .venv/bin/python benchmarks/packing.py --documents 10000000
    .venv/bin/python benchmarks/packing.py --tokenizer data/tokenizer --corpus data/text --corpus data/captions

Without corpora, lengths are log-normal, as those of web pages. Every measurement has a process of its own.
"""

import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, get_args

import numpy as np
import typer
from lognormal import anonymous_kilobytes, write_lognormal
from rich.console import Console
from rich.table import Table

from megatron_kosmos.config.data import CorpusConfig, Packing
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.corpora.manifest import read_manifest
from megatron_kosmos.data.loading.mixture import Epochs
from megatron_kosmos.data.loading.packed_rows import Packer
from megatron_kosmos.data.packing.plan_store import PlanStore
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

RESULTS = Path(__file__).parent / "results" / "packing.json"
TABLE_WIDTH = 180
"""Characters of the table where there is no terminal."""
COLUMNS = {
    "corpus": "{}",
    "packing": "{}",
    "documents": "{:,}",
    "rows": "{:,}",
    "efficiency": "{:.4f}",
    "documents_cut": "{:,}",
    "seconds_to_plan": "{:.1f}",
    "documents_per_cpu_second": "{:,.0f}",
    "seconds_to_first_row_of_next_process": "{:.1f}",
    "peak_bytes_per_document": "{:.0f}",
    "worker_kilobytes": "{:,}",
}


def main(
    corpus: Annotated[list[Path] | None, typer.Option(help="Prefix of a prepared corpus.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer that the corpora were prepared with.")] = None,
    documents: Annotated[int, typer.Option(help="Documents of a made-up corpus, without --corpus.")] = 1_000_000,
    sequence_length: Annotated[int, typer.Option(help="T, tokens of a sequence.")] = 2048,
    num_latents: Annotated[int, typer.Option(help="Slots of a picture.")] = 64,
) -> None:
    """Measure the three ways of packing one after the other, print a table and write it."""
    with tempfile.TemporaryDirectory() as folder:
        if not corpus:
            tokenizer, corpus = Path(folder) / "tokenizer", [Path(folder) / "lognormal"]
            train_tokenizer(list(topics.values())[:20], TrainingSettings(400)).save(tokenizer)
            write_lognormal(corpus[0], documents, KosmosTokenizer.load(tokenizer))
        if tokenizer is None:
            raise typer.BadParameter("--corpus needs --tokenizer")
        row_format = RowFormat(sequence_length=sequence_length, num_latents=num_latents)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
            rows = [
                pool.submit(measure, prefix, tokenizer, row_format, packing, Path(folder)).result()
                for prefix in corpus
                for packing in get_args(Packing)
            ]
    rows += [whole_of(packing, rows) for packing in get_args(Packing) if len(corpus) > 1]
    table = Table(*(name.replace("_", " ") for name in COLUMNS))
    for row in rows:
        table.add_row(*(form.format(row[name]) if name in row else "" for name, form in COLUMNS.items()))
    console = Console()
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table)
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "packing": rows}, indent=2) + "\n", encoding="utf-8")


def measure(prefix: Path, tokenizer: Path, row_format: RowFormat, packing: Packing, folder: Path) -> dict[str, Any]:
    """Return what planning the first epoch of a corpus takes and what comes of it."""
    kosmos_tokenizer = KosmosTokenizer.load(tokenizer)
    config = CorpusConfig(kind=read_manifest(prefix).kind, prefix=prefix)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packer = Packer(Corpus(config, kosmos_tokenizer), row_format, kosmos_tokenizer, skip_misfits=True)
    store = PlanStore(folder / "plans")
    started, cpu_started = time.perf_counter(), time.process_time()
    summary = Epochs(packer, 1, 0, packing, store).summary(0)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    started = time.perf_counter()
    other = Packer(Corpus(config, kosmos_tokenizer), row_format, kosmos_tokenizer, skip_misfits=True)
    Epochs(other, 1, 0, packing, store).row(0)
    seconds_to_first_row = time.perf_counter() - started
    worker = growth_in_a_worker(Epochs(packer, 1, 0, packing, store), summary.num_rows)
    return {
        "corpus": prefix.name,
        "packing": packing,
        "documents": len(packer.documents),
        "rows": summary.num_rows,
        "efficiency": summary.num_tokens / (summary.num_rows * row_format.sequence_length),
        "documents_cut": summary.documents_cut,
        "seconds_to_plan": seconds,
        "documents_per_cpu_second": len(packer.documents) / cpu_seconds,
        "seconds_to_first_row_of_next_process": seconds_to_first_row,
        "peak_bytes_per_document": peak * 1024 / len(packer.documents),
        "worker_kilobytes": worker,
    }


def whole_of(packing: Packing, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what an epoch of every corpus comes to: a row is one of so many, whatever corpus it is of."""
    mine = [row for row in rows if row["packing"] == packing]
    num_rows = sum(row["rows"] for row in mine)
    return {
        "corpus": "all",
        "packing": packing,
        "documents": sum(row["documents"] for row in mine),
        "rows": num_rows,
        "efficiency": sum(row["efficiency"] * row["rows"] for row in mine) / num_rows,
        "documents_cut": sum(row["documents_cut"] for row in mine),
    }


def growth_in_a_worker(epochs: Epochs, num_rows: int) -> int:
    """Return the memory of its own, in kB, that a forked worker needs for reading rows all over the epoch."""
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def read() -> None:
        before = anonymous_kilobytes()
        for number in range(0, num_rows, max(1, num_rows // 1000)):
            epochs.row(number)
        sending.send(anonymous_kilobytes() - before)

    worker = multiprocessing.get_context("fork").Process(target=read)
    worker.start()
    worker.join()
    return int(receiving.recv())


if __name__ == "__main__":
    typer.run(main)
