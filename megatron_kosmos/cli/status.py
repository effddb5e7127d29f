"""`kosmos status`: how runs stand, for a terminal."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from megatron_kosmos.engine.status import RunStatus

BARS: Final = "▁▂▃▄▅▆▇█"
CURVE_WIDTH: Final = 32
STYLES: Final = {"running": "green", "finished": "green", "refused": "red", "silent": "red"}


def register(app: typer.Typer) -> None:
    """Add the command `status`."""
    app.command("status")(status)


def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Folders of runs; several become a table.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between looks.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a run instead.")] = False,
) -> None:
    """Tell how training runs stand, from the files in their folders; they may run anywhere."""
    console = Console()
    if as_json:
        _print_json(runs)
        while watch:
            time.sleep(every)
            _print_json(runs)
    elif watch:
        with Live(_picture(runs), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(_picture(runs), refresh=True)
    else:
        console.print(_picture(runs))


def _print_json(runs: Sequence[Path]) -> None:
    for one in _read(runs):
        print(json.dumps(asdict(one)), flush=True)


def _picture(runs: Sequence[Path]) -> RenderableType:
    read = _read(runs)
    return describe(read[0]) if len(read) == 1 else compare(read)


def _read(runs: Sequence[Path]) -> "list[RunStatus]":
    from megatron_kosmos.engine.status import NoRunError, read_status

    try:
        return [read_status(run) for run in runs]
    except NoRunError as error:
        sys.exit(f"kosmos status: {error}")


def describe(one: "RunStatus") -> RenderableType:
    """Return one run, line by line, with its warnings beneath."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(one):
        table.add_row(name, value)
    return Group(table, *_warnings(one))


def compare(statuses: "Sequence[RunStatus]") -> RenderableType:
    """Return a table with a line a run, and the warnings of all beneath."""
    table = Table("run", "state", "step", "loss", "tokens/s", "MFU", "checkpoint", "expected end")
    for one in statuses:
        checkpoint = (
            "-" if one.checkpoint_step is None else f"{one.checkpoint_step}, {_ago(one.checkpoint_age_seconds)}"
        )
        table.add_row(
            Text(one.run_dir),
            Text(one.state, STYLES.get(one.state, "yellow")),
            _progress(one),
            f"{_figure(one, 'loss', '.4f')} {sparkline(one.losses, 12)}",
            _figure(one, "tokens_per_second", ",.0f"),
            _figure(one, "mfu", ".1%"),
            checkpoint,
            _end(one),
        )
    return Group(table, *(line for one in statuses for line in _warnings(one, f"{one.run_dir}: ")))


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Return `values` as a curve of `width` characters at most, each the mean of as many values, from the lowest up."""
    width = min(width, len(values))
    parts = [values[len(values) * n // width : len(values) * (n + 1) // width] for n in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[round((mean - low) / (high - low) * 7) if high > low else 0] for mean in means)


def _rows(one: "RunStatus") -> Iterator[tuple[str, RenderableType]]:
    newest = one.metrics
    yield "run", Text(one.run_dir)
    yield "state", Text(f"{one.state}{': ' if one.details else ''}{one.details}", STYLES.get(one.state, "yellow"))
    yield "step", f"{_progress(one)}   newest metrics {_ago(one.metrics_age_seconds)}"
    yield "expected end", _end(one)
    change = "" if one.loss_change is None else f"   {one.loss_change:+.4f} lately"
    yield "loss", f"{_figure(one, 'loss', '.4f')}  {sparkline(one.losses)}{change}"
    kinds = [name for name in newest if name.startswith("loss_") and newest[name] is not None]
    yield "by source", "   ".join(f"{name.removeprefix('loss_')} {newest[name]:.4f}" for name in kinds) or "-"
    yield "optimizer", f"grad norm {_figure(one, 'grad_norm', '.3f')}   lr {_figure(one, 'lr', '.3g')}"
    speed = (
        f"{_figure(one, 'tokens_per_second', ',.0f')} tokens/s   {_figure(one, 'images_per_second', ',.1f')} images/s"
    )
    yield "speed", f"{speed}   MFU {_figure(one, 'mfu', '.1%')}"
    shares = [(name.removeprefix("share_"), value) for name, value in newest.items() if name.startswith("share_")]
    total = _figure(one, "seconds_total", ".3g")
    yield "a step", f"{total} s: " + ", ".join(f"{name} {value:.0%}" for name, value in shares) if shares else "-"
    ratio = _figure(one, "image_text_ratio", ".2f")
    yield "data", f"packing {_figure(one, 'packing_efficiency', '.2%')}   image slots per text target {ratio}"
    memory = [(name.removeprefix("memory_"), value) for name, value in newest.items() if name.startswith("memory_")]
    yield "memory", "   ".join(f"{name.replace('_', ' ')} {value / 2**30:.2f} GiB" for name, value in memory) or "-"
    worst, median = _figure(one, "rank_seconds_worst", ".3g"), _figure(one, "rank_seconds_median", ".3g")
    yield "ranks", f"slowest {newest.get('rank_slowest', '-')}: computes {worst} s a step, median {median} s"
    saved = "-" if one.checkpoint_step is None else f"step {one.checkpoint_step}, {_ago(one.checkpoint_age_seconds)}"
    yield "checkpoint", saved
    measured = "   ".join(f"{name} {value:.4f}" for name, value in one.heldout.items())
    yield "held out", f"{measured}   (step {one.heldout_step})" if measured else "-"


def _warnings(one: "RunStatus", prefix: str = "") -> Iterator[RenderableType]:
    for warning in one.warnings:
        yield Text(f"! {prefix}{warning}", "yellow")


def _figure(one: "RunStatus", name: str, form: str) -> str:
    value = one.metrics.get(name)
    return format(value, form) if isinstance(value, int | float) else "-"


def _progress(one: "RunStatus") -> str:
    if one.steps is None:
        return f"{one.step} of ?"
    return f"{one.step} of {one.steps} ({one.step / one.steps:.0%})"


def _end(one: "RunStatus") -> str:
    if one.expected_end is None or one.seconds_left is None:
        return "-"
    left = timedelta(seconds=round(one.seconds_left))
    return f"{datetime.fromtimestamp(one.expected_end):%Y-%m-%d %H:%M}, in {left}"


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{timedelta(seconds=round(seconds))} ago"
