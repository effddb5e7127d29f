"""What does a save cost the training? Trains a model of 0.6 GB of masters and moments and writes
results/checkpoint_saving.json.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/checkpoint_saving.py

The real trainer on one CPU process, fp32 under ZeRO 1. Stretches of steps alternate: without a save, with one that
training goes on beside, and with one that it waits for. Lost is what a stretch takes longer than one without a save.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import date
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import RunConfig, load_config
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.engine.trainer import StepReport, Trainer
from megatron_kosmos.parallel.topology import build_topology, start_process_group, stop_process_group

ROOT = Path(__file__).parents[1]
WAYS = ("without", "asynchronous", "synchronous")
OVERRIDES = (
    "model.decoder.num_layers=14",
    "model.decoder.width=512",
    "model.decoder.ffn_width=2048",
    "model.decoder.num_heads=8",
    "model.decoder.vocab_size=8192",
    "training.micro_batch_size=1",
    "training.global_batch_size=1",
    "optimizer.warmup_steps=0",
)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way gets a stretch.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a stretch; a save must fit in.")] = 20,
    folder: Annotated[
        Path | None, typer.Option(help="Where checkpoints are written; by default a temporary one.")
    ] = None,
) -> None:
    """Train, print a table and write the figures."""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        num_steps = 1 + steps * len(WAYS) * rounds
        overrides = (*OVERRIDES, f"training.steps={num_steps}", f"run_dir={run_dir}")
        measured = measure(load_config(ROOT / "configs" / "kosmos_tiny.yaml", overrides), steps)
    table = Table("", *WAYS[1:], title=f"a save of {measured['bytes'] / 1e6:,.0f} MB, medians of {rounds}")
    table.add_row("pause, s", *(f"{measured[way]['pause']:.3f}" for way in WAYS[1:]))
    table.add_row("pause / a copy of the bytes", *(f"{measured[way]['pause_in_copies']:.2f}" for way in WAYS[1:]))
    table.add_row("training time lost, s", *(f"{measured[way]['lost']:.3f}" for way in WAYS[1:]))
    table.add_row("of a synchronous save", f"{measured['lost_share']:.1%}", "")
    Console().print(table)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    record = {"machine": machine, "date": date.today().isoformat(), "rounds": rounds, "steps": steps, **measured}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "checkpoint_saving.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(run: RunConfig, steps: int) -> dict[str, Any]:
    """Return medians over the stretches of a training run."""
    os.environ.setdefault("LOCAL_RANK", "0")
    topology = build_topology(run.parallel, start_process_group(0, 1, 0))
    stage, _ = build_stage(run, topology)
    store = CheckpointStore(run.run_dir, topology, keep_last=1)
    stretches = Stretches(store, stage, steps, {"config": run.model_dump(mode="json")})
    Trainer(run, StepRunner(run, stage, topology), [stretches]).train(0, batches(run))
    stop_process_group()
    copy = median(stretches.copies)
    usual = median(stretches.seconds["without"])
    lost = {way: median(stretches.seconds[way]) - usual for way in WAYS[1:]}
    figures = {
        way: {"pause": median(pauses), "pause_in_copies": median(pauses) / copy, "lost": lost[way]}
        for way, pauses in stretches.pauses.items()
    }
    return {
        "bytes": stretches.saver.background.num_bytes,
        "copy_seconds": copy,
        "stretch_seconds": usual,
        **figures,
        "lost_share": lost["asynchronous"] / lost["synchronous"],
        "stretches": stretches.seconds,
        "pauses": stretches.pauses,
        "copies": stretches.copies,
    }


class Stretches:
    """A trainer's callback that begins a stretch of the next way every so many steps."""

    def __init__(self, store: CheckpointStore, stage: Stage, steps: int, state: Mapping[str, Any]) -> None:
        self.saver, self.steps, self.state = store.saver(stage), steps, state
        self.pauses: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.copies: list[float] = []
        self._began = 0.0

    def after_step(self, report: StepReport) -> None:
        """Save at the beginning of a stretch, and measure it at its end, when what it began is on the disk."""
        number, position = divmod(report.step - 1, self.steps)
        if position:
            self.saver.background.poll()
            return
        self.saver.background.wait()
        now = time.perf_counter()
        if number:
            self.seconds[WAYS[(number - 1) % len(WAYS)]].append(now - self._began)
        self._measure_a_copy()
        dist.barrier()
        self._began = time.perf_counter()
        way = WAYS[number % len(WAYS)]
        if way == "without" or report.is_last:
            return
        self.saver.save(report.step, self.state)
        if way == "synchronous":
            self.saver.background.wait()
        self.pauses[way].append(time.perf_counter() - self._began)

    def _measure_a_copy(self) -> None:
        """Time a copy of as many bytes as are saved, between pages that are there."""
        source = torch.ones(self.saver.background.num_bytes // 4)
        target = torch.zeros_like(source).add_(1)
        began = time.perf_counter()
        target.copy_(source)
        self.copies.append(time.perf_counter() - began)

    def close(self) -> None:
        """Wait for what is being written."""
        self.saver.background.close()


def batches(run: RunConfig) -> Iterator[list[MultimodalBatch]]:
    """Return the same row of text again and again."""
    length = run.data.sequence_length
    ids_T = torch.randint(10, run.model.decoder.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
    batch = MultimodalBatch(
        input_ids=ids_T[None, :-1],
        labels=ids_T[None, 1:],
        loss_mask=torch.ones(1, length, dtype=torch.bool),
        position_ids=torch.arange(length)[None],
        document_starts=row_starts(1, length),
        images=torch.zeros(0, 3, run.model.vision.image_size, run.model.vision.image_size),
        image_positions=torch.zeros(0, 2, dtype=torch.int64),
        sources=torch.zeros(1, dtype=torch.int64),
    )
    return repeat([batch])


if __name__ == "__main__":
    typer.run(main)
