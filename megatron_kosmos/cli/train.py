"""`kosmos train`: one rank of a training run, started by torchrun (or alone).

What the script that started it has to know of its end stands in run_dir/ended (`engine.ending`).
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn

import typer

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.config import ConfigError, RunConfig, find_run_dir, load_config

if TYPE_CHECKING:
    from megatron_kosmos.engine.ending import Ending
    from megatron_kosmos.engine.interruption import Interruption

EXIT_INTERRUPTED = os.EX_TEMPFAIL
"""75: what an interrupted run ends with; torchrun makes a 1 of it."""


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
    if dry_run:
        try:
            _print_plan(load_config(config, overrides or ()), world_size or started)
        except ConfigError as error:
            sys.exit(f"kosmos train: {error}" if rank == 0 else 1)
    elif world_size is not None:
        sys.exit("kosmos train: --world-size plans for processes that are not there: it needs --dry-run")
    else:
        _train(config, overrides or (), rank, started)


def _print_plan(run: RunConfig, world_size: int) -> None:
    quiet_libraries()
    from rich.console import Console

    from megatron_kosmos.engine.dry_run import plan, render

    render(plan(run, world_size), Console())


def _train(config: list[Path], overrides: Sequence[str], rank: int, world_size: int) -> None:
    from megatron_kosmos.data.errors import DataError
    from megatron_kosmos.engine.ending import forget_ending, is_finished
    from megatron_kosmos.engine.interruption import Interruption
    from megatron_kosmos.engine.preflight import check_before_start

    with Interruption().listening() as interruption:
        try:
            run = load_config(config, overrides)
        except ConfigError as error:
            _refuse(find_run_dir(config, overrides), error, is_said=rank == 0)
        if is_finished(run):
            if rank == 0:
                _leave_word(run.run_dir, "finished", "")
                print(f"kosmos train: {run.run_dir} has all its {run.training.steps} steps: nothing to do")
            return
        if rank == 0:
            with suppress(OSError):  # told of when the logs cannot be written either
                forget_ending(run.run_dir)
        try:
            check_before_start(run, world_size)
        except ConfigError as error:
            # Every rank finds the same mistake; one of them says it.
            _refuse(run.run_dir, error, is_said=rank == 0)
        except DataError as error:
            # Files may be missing on one machine only: one process of each says it.
            _refuse(run.run_dir, error, is_said=_is_first_of_machine())
        _train_together(run, rank, world_size, interruption)


def _train_together(run: RunConfig, rank: int, world_size: int, interruption: "Interruption") -> None:
    quiet_libraries()
    from rich.console import Console

    from megatron_kosmos.checkpoint.errors import CheckpointError, SavingFailed
    from megatron_kosmos.engine.health import Unhealthy
    from megatron_kosmos.engine.interruption import Interrupted
    from megatron_kosmos.engine.reading import ReadingFailed
    from megatron_kosmos.engine.run import Supervision
    from megatron_kosmos.engine.run import train as train_run
    from megatron_kosmos.observability.logging import start_logging
    from megatron_kosmos.parallel.topology import start_process_group, stop_process_group

    try:
        start_logging(run.run_dir, rank, Console())
    except OSError as error:
        sys.exit(f"kosmos train: rank {rank} cannot write to run_dir={run.run_dir}: {error}")
    supervision = Supervision.of_rank(run, rank, interruption)
    end = _End("finished", 0)
    try:
        seconds = supervision.collective_seconds
        device = start_process_group(rank, world_size, int(os.environ["LOCAL_RANK"]), seconds)
        train_run(run, device, supervision)
    except ConfigError as error:
        # A kernel may be missing on one machine only.
        _refuse(run.run_dir, error, is_said=_is_first_of_machine())
    except Interrupted as error:
        end = _End("interrupted", EXIT_INTERRUPTED, f"{error}; started again, it goes on from there")
    except SavingFailed as error:
        end = _End(None, 1, str(error))
    except (CheckpointError, ReadingFailed, Unhealthy) as error:
        end = _End("refused", 1, str(error))
    if rank == 0:
        end.tell(run.run_dir)
    # All are here. The launcher ends the rest as soon as one process has failed: not before that is said. After another
    # error, leaving in good order would wait for ranks that sit in a collective.
    stop_process_group(wait_for_all=end.code != 0)
    if end.code:
        sys.exit(end.code)


class _End(NamedTuple):
    """How all ranks end alike."""

    ending: "Ending | None"
    code: int
    message: str = ""

    def tell(self, run_dir: Path) -> None:
        """Leave word for scripts and for people."""
        if self.ending is not None:
            _leave_word(run_dir, self.ending, self.message)
        if self.message:
            print(f"kosmos train: {self.message}", file=sys.stderr, flush=True)


def _refuse(run_dir: Path | None, error: Exception, is_said: bool) -> NoReturn:
    """End this rank, which cannot go on and may be alone in that. The others end by it or by their launcher."""
    if run_dir is not None:
        _leave_word(run_dir, "refused", str(error))
    sys.exit(f"kosmos train: {error}" if is_said else 1)


def _leave_word(run_dir: Path, ending: "Ending", details: str) -> None:
    from megatron_kosmos.engine.ending import ending_path, write_ending

    try:
        write_ending(run_dir, ending, details)
    except OSError as error:
        print(f"kosmos train: {ending}, but {ending_path(run_dir)} cannot say so: {error}", file=sys.stderr, flush=True)


def _is_first_of_machine() -> bool:
    return os.environ["LOCAL_RANK"] == "0"
