"""`kosmos preprocess`: source documents to a prepared corpus, with a progress bar and a report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_kosmos.prompt import SourceKind

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_kosmos.data.manifest import Manifest
    from megatron_kosmos.data.preprocess import Preparation

KINDS: dict[str, SourceKind] = {"text": "text", "captions": "caption", "interleaved": "interleaved"}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("preprocess")(preprocess)


def preprocess(  # noqa: PLR0913 - a command's parameters are its options
    kind: Annotated[Literal["text", "captions", "interleaved"], typer.Argument(help="What the inputs hold.")],
    *,
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            help='text: .jsonl {"text": …}, .txt, .parquet. captions: webdataset and img2dataset .tar; .jsonl, '
            '.parquet {"image": PATH or bytes, "caption": …}; .tsv CAPTION<tab>PATH. interleaved: .jsonl {"parts": '
            '[{"text": …}, {"image": PATH}, …]}; MMC4 .jsonl; OBELICS .parquet or .jsonl; .html. All but .tar and '
            ".parquet also with .gz or .zst behind.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="PREFIX of the files to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder that `kosmos tokenizer` made.")],
    more_inputs: Annotated[
        list[Path] | None, typer.Argument(help="More inputs, so that `--input *.jsonl` works.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize and check pictures.")] = 1,
    on_bad: Annotated[
        Literal["error", "skip"],
        typer.Option(help="Stop at a bad document or damaged file, or list it in PREFIX.skipped.jsonl."),
    ] = "error",
    text_field: Annotated[str, typer.Option(help="text: field or column of the text.")] = "text",
    image_field: Annotated[
        str,
        typer.Option(help="captions: field or column of the picture: a path, bytes, or Hugging Face's pair of both."),
    ] = "image",
    caption_field: Annotated[
        str,
        typer.Option(
            help="captions: field or column of the caption; in tars, another name takes the .json, not the .txt."
        ),
    ] = "caption",
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Folder where relative paths of pictures start.", show_default="that of the input file"),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="T: a document's pictures must fit it together.")] = 2048,
    num_latents: Annotated[int, typer.Option(min=1, help="L: tokens that a picture takes beside its markers.")] = 64,
    max_images: Annotated[int | None, typer.Option(min=1, help="Filter: keep a document's first N pictures.")] = None,
    halve_single_image: Annotated[
        bool, typer.Option("--halve-single-image", help="Filter: drop half of the one-picture documents.")
    ] = False,
    min_image_side: Annotated[int | None, typer.Option(min=1, help="Filter: drop smaller pictures (pixels).")] = None,
    drop_single_colour: Annotated[
        bool, typer.Option("--drop-single-colour", help="Filter: drop pictures of one colour.")
    ] = False,
    drop_unusable_images: Annotated[
        bool,
        typer.Option(
            "--drop-unusable-images",
            help="Filter: drop pictures that are missing, remote or damaged, and keep their documents.",
        ),
    ] = False,
    max_shard_megabytes: Annotated[int, typer.Option(min=1, help="Size at which a picture shard is full.")] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus that is there already.")] = False,
) -> None:
    """Turn documents into an indexed binary of tokens, picture shards and a manifest."""
    from megatron_kosmos.data.filters import Filters
    from megatron_kosmos.data.input_format import InputFormat
    from megatron_kosmos.data.preprocess import Preparation
    from megatron_kosmos.data.row_format import RowFormat

    run(
        Preparation(
            kind=KINDS[kind],
            inputs=(*inputs, *(more_inputs or ())),
            output=output,
            tokenizer=tokenizer,
            num_workers=workers,
            on_bad=on_bad,
            filters=Filters(
                max_images=max_images,
                halve_single_image=halve_single_image,
                min_image_side=min_image_side,
                drop_single_colour=drop_single_colour,
                drop_unusable_images=drop_unusable_images,
            ),
            row_format=RowFormat(sequence_length=sequence_length, num_latents=num_latents),
            input_format=InputFormat(
                text_field=text_field,
                image_field=image_field,
                caption_field=caption_field,
                image_folder=image_folder,
            ),
            max_shard_bytes=max_shard_megabytes << 20,
            overwrite=overwrite,
        )
    )


def run(preparation: "Preparation") -> None:
    """Prepare the corpus under a progress bar and print the report; a bad input ends the process with its message."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_kosmos.data.errors import DataError
    from megatron_kosmos.data.preprocess import prepare

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
    )
    total = sum(file.stat().st_size for file in preparation.inputs if file.is_file())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(preparation.output.name, total=total, documents=0)
            documents = 0

            def show(num_bytes: int, num_documents: int) -> None:
                nonlocal documents
                documents += num_documents
                progress.update(task, advance=num_bytes, documents=documents)

            manifest = prepare(preparation, show)
            progress.update(task, completed=total)
    except DataError as error:
        sys.exit(f"kosmos preprocess: {error}")
    _report(preparation, manifest, console)


def _report(preparation: "Preparation", manifest: "Manifest", console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    from megatron_kosmos.data.manifest import path_with
    from megatron_kosmos.data.preprocess import SKIPPED_SUFFIX

    table = Table(title=Text(str(preparation.output)), title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_row("documents", f"{manifest.documents:,}")
    table.add_row("tokens", f"{manifest.tokens:,}")
    if manifest.kind != "text":
        table.add_row("images", f"{manifest.images:,}")
        table.add_row("most images in a document", f"{manifest.max_images_per_document:,}")
    for what, counts in (
        ("documents skipped", manifest.skipped),
        ("documents filtered out", manifest.filtered),
        ("images dropped", manifest.dropped_images),
    ):
        for reason, count in counts.items():
            table.add_row(f"{what}: {reason}", f"{count:,}")
    for packing, summary in manifest.packing.items():
        figures = f"{summary.efficiency:.2%} filled, {summary.documents_cut:,} documents cut"
        table.add_row(f"sequences packed by {packing}", f"{summary.rows:,}, {figures}")
    table.add_row("bytes written", f"{sum(record.bytes for record in manifest.files.values()):,}")
    console.print(table)
    if manifest.skipped:
        listed = path_with(preparation.output, SKIPPED_SUFFIX)
        console.print(f"skipped documents are listed in {listed}", markup=False, soft_wrap=True)
