"""What does converting a whole model cost? Measures `kosmos convert` and writes results/conversion.json.

    .venv/bin/python benchmarks/conversion.py --folder /data/scratch
    .venv/bin/python benchmarks/conversion.py --preset kosmos2 --format kosmos2 --folder /data/scratch

A checkpoint of random weights of a preset's sizes goes to Hugging Face and back, with and without comparing the two
models. Every conversion is a process of its own, and its files count as written when they are on the disk, as do those
of the copies before and after it that it is compared with. Needs five times the checkpoint's size: 33 GB for kosmos1.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_kosmos.checkpoint.folders import CHECKPOINTS
from megatron_kosmos.checkpoint.write_tensors import TensorWriter
from megatron_kosmos.config import RunConfig, load_config
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX
from megatron_kosmos.engine.conversion import MAX_FILE_BYTES, REPORT_FILE
from megatron_kosmos.engine.verify_conversion import training_model
from megatron_kosmos.model.names import named_parameters

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conversion.json"
COLUMNS = {
    "what": "{}",
    "seconds": "{:.1f}",
    "times_copying": "{:.2f}",
    "times_copying_once_loaded": "{:.2f}",
    "cpu_seconds": "{:.1f}",
    "peak_gigabytes": "{:.2f}",
    "largest_logit_difference": "{:.2g}",
}


def main(
    preset: Annotated[str, typer.Option(help="Name of a file in configs/.")] = "kosmos1",
    folder: Annotated[Path | None, typer.Option(help="Where there is room; a temporary folder is made there.")] = None,
) -> None:
    """Measure one preset."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        # In a process of its own: what the parent ever took would count as its children's peak.
        with ProcessPoolExecutor(1) as maker:
            run = load_config(ROOT / "configs" / f"{preset}.yaml", [f"run_dir={root / 'run'}"])
            source = maker.submit(make_run, run, root).result()
        there = ["to-hf", str(root / "run"), str(root / "hf")]
        back = ["from-hf", str(root / "hf"), str(root / "back"), "--config", str(root / "run" / "config.yaml")]
        start = started()
        rows = [{"what": "loading the libraries", "seconds": start}, copied(source, root / "copy")]
        for verify in ("--no-verify", "--verify"):
            for arguments, output in ((there, root / "hf"), (back, root / "back")):
                rows.append(converted([*arguments, verify], output))
                rows.append(copied(source, root / "copy"))
                between = (rows[-3]["seconds"] + rows[-1]["seconds"]) / 2
                rows[-2]["times_copying"] = rows[-2]["seconds"] / between
                rows[-2]["times_copying_once_loaded"] = (rows[-2]["seconds"] - start) / between
        size = sum(path.stat().st_size for path in source.iterdir())
    result = {
        "preset": preset,
        "gigabytes": size / 1e9,
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(*COLUMNS, title=f"{preset}, {size / 1e9:.2f} GB, {os.cpu_count()} CPUs")
    for row in rows:
        table.add_row(*(shape.format(row[name]) if name in row else "" for name, shape in COLUMNS.items()))
    Console().print(table)


def make_run(run: RunConfig, root: Path) -> Path:
    """Write a run with one checkpoint of random weights and a tokenizer; return the checkpoint."""
    train_tokenizer(list(topics.values()), TrainingSettings(vocab_size=2000)).save(root / "tokenizer")
    data = run.data.model_copy(update={"tokenizer": root / "tokenizer"})
    run = run.model_copy(update={"data": data})
    checkpoint = run.run_dir / CHECKPOINTS / "step_00000001"
    checkpoint.mkdir(parents=True)
    with training_model(run) as (model, _):
        shapes = {named.name: named.parameter.shape for named in named_parameters(model)}
    generator = torch.Generator().manual_seed(0)
    writer = TensorWriter(checkpoint, MAX_FILE_BYTES)
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        writer.add(MODEL_PREFIX + name, tensor + 1 if "norm" in name and name.endswith("weight") else tensor)
    config = run.model_dump(mode="json")
    writer.close(1, {"config": config, "step": 1, "updates": 1, "data": None})
    (run.run_dir / "config.yaml").write_text(json.dumps(config))  # which is YAML, too
    return checkpoint


def copied(source: Path, target: Path) -> dict[str, Any]:
    """Copy a checkpoint."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    shutil.copytree(source, target)
    to_disk(target)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return {"what": "copying the checkpoint", "seconds": seconds}


def started() -> float:
    """Return the seconds that a process takes to load what a conversion needs, the second time."""
    for _ in range(2):
        began = time.perf_counter()
        load = "from megatron_kosmos.engine import convert, from_hf"
        subprocess.run([sys.executable, "-c", load], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    return seconds


def converted(arguments: list[str], output: Path) -> dict[str, Any]:
    """Run a conversion to a folder that is not there and return what it took."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "megatron_kosmos", "convert", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kosmos convert {' '.join(arguments)} failed")
    to_disk(output)
    report = json.loads((output / REPORT_FILE).read_text())
    row = {
        "what": f"{arguments[0]} {'--verify' if '--verify' in arguments else '--no-verify'}",
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gigabytes": usage.ru_maxrss * 1024 / 1e9,
    }
    if report["max_abs_logit_diff"] is not None:
        row["largest_logit_difference"] = report["max_abs_logit_diff"]
    return row


def to_disk(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


if __name__ == "__main__":
    typer.run(main)
