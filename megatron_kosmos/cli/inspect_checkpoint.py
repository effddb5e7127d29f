"""`kosmos inspect checkpoint`: what a checkpoint holds, and how it differs from another, as tables."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_kosmos.cli.libraries import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megatron_kosmos.checkpoint.figures import TensorFigures
    from megatron_kosmos.engine.compare_checkpoints import Change, Comparison
    from megatron_kosmos.engine.inspect_checkpoint import CheckpointFigures, Facts, PartFigures, Show

MOST_CHANGED = 10
"""Tensors that a comparison lists."""


def checkpoint(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A checkpoint folder, or a run (its newest one).")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="A checkpoint or a run to compare it with.")
    ] = None,
    *,
    tensors: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="List the tensors whose names match, such as '*.layers.0.*'.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Check every file's SHA-256; without it, the sizes only.")] = True,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write with all of it.")] = None,
) -> None:
    """Print step, layout, parameters and norms by part; with OTHER, what differs."""
    quiet_libraries()
    from rich.console import Console

    from megatron_kosmos.checkpoint.errors import CheckpointError, DamagedCheckpointError
    from megatron_kosmos.engine import inspect_checkpoint as inspection
    from megatron_kosmos.engine.compare_checkpoints import as_json, compare

    console, comparison = Console(), None
    try:
        with _progress() as show:
            stored = inspection.open_checkpoint(source, verify, show)
            facts = inspection.read_facts(stored, verify)
            listed = [] if tensors is None else inspection.matching(stored, tensors)
            another = None if other is None else inspection.open_checkpoint(other, verify, show)
            figures = inspection.measure(stored, facts, show)
            if another is not None:
                its_facts = inspection.read_facts(another, verify)
                comparison = compare(stored, figures, another, its_facts, show)
        _print_figures(figures, console)
        if tensors is not None:
            _print_tensors([one for one in figures.tensors if one.name in listed], console)
        if comparison is not None:
            _print_comparison(comparison, figures.facts, console)
        if json is not None:
            json.write_text(as_json(figures, comparison), encoding="utf-8")
            console.print(f"all of it is in {json}", markup=False, soft_wrap=True)
    except DamagedCheckpointError as error:
        hint = "\n--no-verify looks at it all the same, if only contents differ" if verify else ""
        sys.exit(f"kosmos inspect checkpoint: {error}{hint}")
    except (CheckpointError, OSError) as error:
        sys.exit(f"kosmos inspect checkpoint: {error}")


@contextmanager
def _progress() -> "Iterator[Show]":
    """Give what shows a bar for each thing that is done one after the other."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {}

        def show(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing)
            progress.update(tasks[doing], completed=done, total=total)

        yield show


def _print_figures(figures: "CheckpointFigures", console: "Console") -> None:
    from rich.filesize import decimal

    _print_facts(figures.facts, console)
    parts = figures.parts
    has_moments = any(part.trained is not None for part in parts)
    counted = ("trained", "frozen") if has_moments else ("elements",)
    table = _table("parameters", "part", numbers=(*counted, "weights", "moments"))

    def add_row(name: str, parts: "Sequence[PartFigures]") -> None:
        counts = [(part.trained or 0, part.frozen or 0) if has_moments else (part.num_elements,) for part in parts]
        sizes = [(part.weight_bytes, part.moment_bytes) for part in parts]
        together = [f"{sum(column):,}" for column in zip(*counts, strict=True)]
        table.add_row(name, *together, *(decimal(sum(column), precision=2) for column in zip(*sizes, strict=True)))

    for part in parts:
        add_row(part.part, [part])
    table.add_section()
    add_row("all", parts)
    table.caption = "trained: has moments" if has_moments else None
    console.print(table)
    if not has_moments:
        console.print("no moments: AdamW starts from zero for whatever is trained", soft_wrap=True)

    table = _table("norms", "part", numbers=("weights", "largest", "exp_avg", "exp_avg_sq", "update rms"))
    for part in parts:
        norms = part.weight_norm, part.largest_weight, part.exp_avg_norm, part.exp_avg_sq_norm, part.update_rms
        table.add_row(part.part, *map(_number, norms))
    table.caption = "largest: absolute value; update rms: of exp_avg / √exp_avg_sq where there was a gradient"
    console.print(table)
    if not figures.not_finite:
        console.print("every element is finite")
    for one in figures.not_finite:
        text = f"{one.name} {list(one.shape)} has {one.num_nan:,} NaN and {one.num_inf:,} infinite elements"
        console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _print_facts(facts: "Facts", console: "Console") -> None:
    from rich.filesize import decimal
    from rich.markup import escape

    table = _table(escape(facts.folder), "", "")
    table.show_header = False
    files = f"{facts.num_files} files, {decimal(facts.num_bytes, precision=2)}"
    checked = "every SHA-256 is right" if facts.checksums_verified else "sizes are right, contents not checked"
    training, parallel = facts.config.get("training", {}), facts.config.get("parallel")
    rows = {
        "step": facts.step,
        "updates": facts.updates,
        "layout": parallel and _settings_that_act(parallel),
        "precision": training.get("precision"),
        "optimizer": facts.config.get("optimizer", {}).get("kind"),
        "kernels": ", ".join(f"{name} {value}" for name, value in facts.config.get("kernels", {}).items()) or None,
        "code": facts.version,
        "data": facts.data,
        "whole": f"{files}, {checked}",
    }
    for name, value in rows.items():
        table.add_row(name, "not recorded" if value is None else str(value))
    console.print(table)


def _settings_that_act(parallel: dict[str, object]) -> str:
    """Say a layout; what is off or one is left out, but for the sizes that are always asked for."""
    sizes = f"{parallel.get('tensor_parallel_size', 1)} tensor x {parallel.get('pipeline_parallel_size', 1)} pipeline"
    said = ("tensor_parallel_size", "pipeline_parallel_size", "zero_stage")
    others = [
        f"{name} {value}" for name, value in parallel.items() if name not in said and value not in (1, False, None)
    ]
    return ", ".join((sizes, f"ZeRO {parallel.get('zero_stage')}", *others))


def _print_tensors(tensors: "Iterable[TensorFigures]", console: "Console") -> None:
    table = _table("tensors", "name", "shape", "dtype", numbers=("norm", "min", "max", "mean", "std"))
    table.columns[0].overflow = "fold"
    for one in tensors:
        numbers = one.norm, one.min, one.max, one.mean, one.std
        table.add_row(one.name, "x".join(map(str, one.shape)), one.dtype, *map(_number, numbers))
    console.print(table)


def _print_comparison(comparison: "Comparison", facts: "Facts", console: "Console") -> None:
    its = comparison.facts
    console.print(f"\ncompared with {its.folder}, step {its.step}", style="bold", markup=False, soft_wrap=True)
    if facts.data != its.data:
        console.print(f"data: {facts.data} here, {its.data} there", markup=False, soft_wrap=True)
    lines = [f"{name}: {mine} here, {there} there" for name, (mine, there) in comparison.settings.items()]
    lines += [f"{name} is missing there" for name in comparison.missing]
    lines += [f"{name} is only there" for name in comparison.left_over]
    lines += [f"{name} is {list(a)} here, {list(b)} there" for name, (a, b) in comparison.misshaped.items()]
    for line in lines or ["settings, names and shapes are the same"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _print_changes("weights by part", comparison.parts, console)
    changed = [one for one in comparison.tensors if not one.is_identical]
    if changed:
        most = changed[:MOST_CHANGED]
        _print_changes(f"weights that changed most, {len(most)} of {len(changed):,}", most, console)
    same = "the same bit by bit" if comparison.moments_identical else "not the same"
    console.print(f"moments are {same}")


def _print_changes(title: str, changes: "Iterable[Change]", console: "Console") -> None:
    table = _table(title, "", numbers=("‖a−b‖", "‖a−b‖ / ‖a‖", "bit by bit"))
    table.columns[0].overflow = "fold"
    for one in changes:
        same = "the same" if one.is_identical else "differs"
        table.add_row(one.name, _number(one.difference), _number(one.relative), same)
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(title: str, *texts: str, numbers: "Iterable[str]" = ()) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*texts, title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table
