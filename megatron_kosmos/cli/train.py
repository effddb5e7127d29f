"""`kosmos train`: one rank of a training run, started by torchrun (or alone)."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.config import ConfigError, RunConfig, load_config


def register(app: typer.Typer) -> None:
    """Add the command `train`."""
    app.command("train")(train)


def train(
    config: Annotated[
        list[Path],
        typer.Option(help="YAML of the run; the presets are in configs/. A later --config changes an earlier one."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c ...", help="Settings to change.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything without memory, print the plan and exit.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: processes to plan for, instead of those started.")
    ] = None,
) -> None:
    """Train from a configuration, from the run's newest checkpoint if it has one.

    Several processes: torchrun --nproc-per-node 8 -m megatron_kosmos train --config configs/kosmos1.yaml a.b=c …
    """
    rank, started = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even of a process that is alone.
    try:
        run = load_config(config, overrides or ())
        if dry_run:
            _print_plan(run, world_size or started)
        elif world_size is not None:
            raise ConfigError("--world-size plans for processes that are not there: it needs --dry-run")
        else:
            _train(run, rank, started)
    except ConfigError as error:
        # Every rank finds the same mistake; one of them says it.
        sys.exit(f"kosmos train: {error}" if rank == 0 else 1)


def _print_plan(run: RunConfig, world_size: int) -> None:
    quiet_libraries()
    from rich.console import Console

    from megatron_kosmos.engine.dry_run import plan, render

    render(plan(run, world_size), Console())


def _train(run: RunConfig, rank: int, world_size: int) -> None:
    from megatron_kosmos.data.errors import DataError
    from megatron_kosmos.engine.preflight import check_before_start

    try:
        check_before_start(run, world_size)
    except DataError as error:
        # Files may be missing on one machine only: one process of each says it.
        sys.exit(f"kosmos train: {error}" if os.environ["LOCAL_RANK"] == "0" else 1)
    quiet_libraries()
    from rich.console import Console

    from megatron_kosmos.checkpoint.errors import CheckpointError
    from megatron_kosmos.engine.reading import ReadingFailed
    from megatron_kosmos.engine.run import train as train_run
    from megatron_kosmos.observability.logging import start_logging
    from megatron_kosmos.parallel.topology import start_process_group, stop_process_group

    try:
        start_logging(run.run_dir, rank, Console())
    except OSError as error:
        sys.exit(f"kosmos train: rank {rank} cannot write to run_dir={run.run_dir}: {error}")
    try:
        device = start_process_group(rank, world_size, int(os.environ["LOCAL_RANK"]))
        train_run(run, device)
    except CheckpointError as error:
        sys.exit(f"kosmos train: {error}" if rank == 0 else 1)
    except ReadingFailed as error:
        if rank == 0:
            print(f"kosmos train: {error}", file=sys.stderr, flush=True)
        # All are here, and the launcher ends the rest as soon as one process is gone: not before that is said.
        stop_process_group(wait_for_all=True)
        sys.exit(1)
    # Only now: after another error, leaving in good order would wait for ranks that sit in a collective.
    stop_process_group()
