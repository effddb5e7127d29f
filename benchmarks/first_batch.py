"""How long from the start of a process to its first batch? Measures large indexes and writes results/first_batch.json.

    .venv/bin/python benchmarks/first_batch.py --documents 10000000

Each measurement is a process of its own with two workers: "cold" makes the plans of the run, "shared" finds them, as
all other processes of the run and every resumption do. Tokens are a hole in a file, so no disk is measured.
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

import psutil
import typer
from lognormal import anonymous_kilobytes, write_lognormal
from rich.console import Console
from rich.table import Table

from megatron_kosmos.config.data import CorpusConfig, DataConfig, Packing
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, StepLoader
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

RESULTS = Path(__file__).parent / "results" / "first_batch.json"
NUM_STEPS = 50
COLUMNS = {
    "packing": "{}",
    "heldout": "{}",
    "plans": "{}",
    "seconds_from_process_start": "{:.1f}",
    "seconds_from_loader": "{:.2f}",
    "anonymous_megabytes": "{:.0f}",
    "after_50_steps": "{:.0f}",
    "peak_megabytes": "{:.0f}",
}


def main(
    documents: Annotated[int, typer.Option(help="Documents of the made-up corpus.")] = 10_000_000,
    sequence_length: Annotated[int, typer.Option(help="T, tokens of a sequence.")] = 2048,
) -> None:
    """Measure the ways of packing, with and without held-out documents, print a table and write it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(list(topics.values())[:20], TrainingSettings(400)).save(folder / "tokenizer")
        write_lognormal(folder / "lognormal", documents, KosmosTokenizer.load(folder / "tokenizer"))
        rows = []
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
            for packing in get_args(Packing):
                for fraction in (None, 0.01):
                    for plans in ("cold", "shared"):
                        corpus = CorpusConfig(kind="text", prefix=folder / "lognormal", heldout_fraction=fraction)
                        data = DataConfig(
                            tokenizer=folder / "tokenizer",
                            sequence_length=sequence_length,
                            train=(corpus,),
                            packing=packing,
                        )
                        plan_folder = folder / f"{packing}-{fraction}"
                        measured = pool.submit(measure, data, plan_folder).result()
                        rows.append({"packing": packing, "heldout": str(fraction), "plans": plans, **measured})
    table = Table(*(name.replace("_", " ") for name in COLUMNS))
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, form in COLUMNS.items()))
    Console().print(table)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    RESULTS.parent.mkdir(exist_ok=True)
    content = {"machine": machine, "documents": documents, "first_batch": rows}
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(data: DataConfig, plan_folder: Path) -> dict[str, Any]:
    """Return when the first batch is there and what memory that and the next steps take."""
    before, started = anonymous_kilobytes(), time.perf_counter()
    geometry = BatchGeometry(micro_batch_size=4, global_batch_size=16)
    loader = StepLoader(data, ImageFormat(64, 224), geometry, seed=1, plan_folder=plan_folder)
    loader.packing_report()
    steps = loader.steps(0, NUM_STEPS)
    next(steps)
    measured = {
        "seconds_from_process_start": time.time() - psutil.Process().create_time(),
        "seconds_from_loader": time.perf_counter() - started,
        "anonymous_megabytes": (anonymous_kilobytes() - before) / 1024,
    }
    for _ in steps:
        pass
    return measured | {
        "after_50_steps": (anonymous_kilobytes() - before) / 1024,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    typer.run(main)
