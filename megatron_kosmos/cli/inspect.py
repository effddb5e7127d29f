"""`kosmos inspect`: looking at what is there, before and after it is used."""

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_kosmos.cli.inspect_checkpoint import checkpoint
from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.config import ConfigError, CorpusConfig, DataConfig, load_config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from megatron_kosmos.data.inspection import DocumentView, Inspection, RowView

SILENT = "·"
"""Stands before tokens that don't count in the loss."""
IMAGE_SIZE = 224
"""Pixels of a picture's side where no model says it: CLIP's."""


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(no_args_is_help=True, help="Look at data as the model will see them, and into checkpoints.")
    group.command("data")(data)
    group.command("checkpoint")(checkpoint)
    app.add_typer(group, name="inspect")


def data(  # noqa: PLR0913 - a command's parameters are its options
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c ...", help="Settings to change.")] = None,
    *,
    config: Annotated[
        list[Path] | None, typer.Option(help="YAML of a run. A later --config changes an earlier one.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="PREFIX of a prepared corpus, instead of --config.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="With --corpus: the tokenizer it was prepared with.")] = None,
    step: Annotated[int, typer.Option(min=1, help="Training step to begin with; a row is a step with --corpus.")] = 1,
    rows: Annotated[int, typer.Option(min=0, help="Packed rows to show.")] = 3,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each row to show.")] = 3,
    page: Annotated[Path | None, typer.Option(help="HTML file to write, with pictures in it.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures of the page.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Steps that the corpora's shares are counted over.")] = 100,
) -> None:
    """Print packed rows token by token and the shares of the corpora; with --page, write a page of pictures too."""
    quiet_libraries()
    from rich.console import Console

    from megatron_kosmos.data.errors import DataError
    from megatron_kosmos.data.inspection_page import Extent, render_page

    extent = Extent(step, rows, documents, pictures, steps)
    try:
        if config and corpus is None and tokenizer is None:
            inspection = _open_run(config, overrides or [])
        elif corpus is not None and tokenizer is not None and not config and not overrides:
            inspection = _open_corpus(corpus, tokenizer)
        else:
            raise ConfigError("give either --config FILE and settings, or --corpus PREFIX and --tokenizer FOLDER")
        console = Console()
        _print_corpora(inspection, steps, console)
        for row in islice(inspection.rows(step, max(1, rows)), rows):
            _print_row(row, documents, console)
        if page is not None:
            title = f"Data of {corpus or ' and '.join(map(str, config or []))}"
            page.write_text(render_page(inspection, title, extent), encoding="utf-8")
            console.print(f"the page is {page}", markup=False)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"kosmos inspect data: {error}")


def _open_run(config: list[Path], overrides: list[str]) -> "Inspection":
    from megatron_kosmos.data.inspection import Inspection
    from megatron_kosmos.data.loading.collate import ImageFormat

    run = load_config(config, overrides)
    images = ImageFormat(run.model.resampler.num_latents, run.model.vision.image_size)
    return Inspection(run.data, images, run.training.global_batch_size, run.training.seed)


def _open_corpus(prefix: Path, tokenizer: Path) -> "Inspection":
    """Open one corpus in rows of the format that it was prepared for."""
    from megatron_kosmos.data.corpora.manifest import read_manifest
    from megatron_kosmos.data.inspection import Inspection
    from megatron_kosmos.data.loading.collate import ImageFormat

    manifest = read_manifest(prefix)
    row_format = manifest.settings.row_format
    blend = DataConfig(
        tokenizer=tokenizer,
        sequence_length=row_format.sequence_length,
        train=(CorpusConfig(kind=manifest.kind, prefix=prefix),),
    )
    return Inspection(blend, ImageFormat(row_format.num_latents, IMAGE_SIZE), global_batch_size=1, seed=0)


def _print_corpora(inspection: "Inspection", num_steps: int, console: "Console") -> None:
    from rich.table import Table

    table = Table("corpus", "kind", "documents", "tokens", "pictures", "share asked", f"in {num_steps} steps")
    for view in inspection.corpora(num_steps):
        table.add_row(
            str(view.corpus.prefix),
            view.corpus.kind,
            f"{view.num_documents:,}",
            f"{int(view.lengths.sum()):,}",
            f"{view.num_images:,}",
            f"{view.weight_share:.2%}",
            f"{view.sample_share:.2%}",
        )
    console.print(table)
    console.print(inspection.packing(), markup=False, highlight=False)


def _print_row(row: "RowView", num_documents: int, console: "Console") -> None:
    from rich.text import Text

    console.print(Text(f"\n{row.headline}", style="bold"))
    for document in row.documents[:num_documents]:
        console.print(Text(f"from column {document.first_column}", style="cyan"))
        console.print(_describe(document))
    if len(row.documents) > num_documents:
        console.print(f"and {len(row.documents) - num_documents} more documents")
    elif row.next_token is not None:
        console.print(Text(f"to be predicted behind the last column: {row.next_token.text}"))
    if row.num_padding:
        console.print(Text(f"[padding {row.num_padding}]"))


def _describe(document: "DocumentView") -> "Text":
    from rich.text import Text

    shown = Text()
    for token in document.tokens:
        shown.append(token.text if token.is_target else SILENT + token.text, "" if token.is_target else "dim")
        shown.append(" ")
    return shown
