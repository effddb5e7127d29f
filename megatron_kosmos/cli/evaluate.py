"""`kosmos evaluate`: an exported model on the held-out data of a configuration."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.config import load_config


def register(app: typer.Typer) -> None:
    """Add the command `evaluate`."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder that `kosmos convert to-hf` wrote.")],
    config: Annotated[
        list[Path],
        typer.Option(help="YAML with data.heldout, such as the run's config.yaml. A later one changes an earlier one."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c ...", help="Settings to change.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    max_pictures: Annotated[int, typer.Option(min=1, help="Pictures to caption, at most.")] = 1000,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences of each corpus to read, at most.")] = 1000,
) -> None:
    """Measure loss by corpus, exact captions (also with shuffled pictures) and the choice among captions."""
    quiet_libraries()
    from rich.console import Console
    from rich.table import Table

    from megatron_kosmos.data.errors import DataError
    from megatron_kosmos.engine.evaluate import Evaluator
    from megatron_kosmos.engine.generate import GenerationError, Generator

    run = load_config(config, overrides or ())
    console = Console()
    try:
        with console.status("loading") as status:
            evaluator = Evaluator(Generator.load(model), run)
            evaluation = evaluator.evaluate(max_pictures, max_sequences, status.update)
    except (DataError, GenerationError, OSError) as error:
        sys.exit(f"kosmos evaluate: {error}")
    table = Table("measure", "value", title=str(model))
    for name, value in evaluation.as_dict().items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for kind, figure in rows:
            shown = "-" if figure is None else f"{figure:.4f}" if isinstance(figure, float) else str(figure)
            table.add_row(f"{name} {kind}".strip(), shown)
    console.print(table)
    if output is not None:
        output.write_text(json.dumps(evaluation.as_dict(), indent=2) + "\n", encoding="utf-8")
