"""`kosmos preprocess`: source documents to a prepared corpus, with a progress bar.

The kinds of documents share one function and its options; the name of the command says which of them it is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_kosmos.cli.preparation_report import print_report
from megatron_kosmos.prompt import SourceKind

if TYPE_CHECKING:
    from megatron_kosmos.data.filters import Filters
    from megatron_kosmos.data.preparation.preprocess import Preparation

KINDS: dict[str, SourceKind] = {"text": "text", "captions": "caption", "interleaved": "interleaved"}


Output = Annotated[Path, typer.Option(help="PREFIX of the files to write.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a corpus, or parts of one, that are there already.")
]


def commands() -> typer.Typer:
    """Return the application of `kosmos preprocess`."""
    app = typer.Typer(
        help="Turn documents into an indexed binary of tokens, picture shards and a manifest.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for kind in KINDS:
        app.command(kind, help=f"Prepare documents of the kind {kind}.")(preprocess)
    app.command("merge")(merge)
    return app


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.add_typer(commands(), name="preprocess")


def preprocess(  # noqa: PLR0913 - a command's parameters are its options
    context: typer.Context,
    *,
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            help='text: .jsonl {"text": …}, .txt, .parquet. captions: webdataset and img2dataset .tar; .jsonl, '
            '.parquet {"image": PATH or bytes, "caption": …}; .tsv CAPTION<tab>PATH. interleaved: .jsonl {"parts": '
            '[{"text": …}, {"image": PATH}, …]}; .jsonl, .parquet {"text": "… <image> …", "images": [PATH, …]}; MMC4 '
            ".jsonl; OBELICS .parquet or .jsonl; .html. All but .tar and .parquet also with .gz or .zst behind.",
        ),
    ],
    output: Output,
    tokenizer: Annotated[Path, typer.Option(help="Folder that `kosmos tokenizer` made.")],
    more_inputs: Annotated[
        list[Path] | None, typer.Argument(help="More inputs, so that `--input *.jsonl` works.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize and check pictures.")] = 1,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at the first bad document, instead of listing it in PREFIX.quarantine.jsonl."
        ),
    ] = False,
    shard_index: Annotated[
        int, typer.Option(min=0, help="Which share of the work to do, from 0; then `merge` makes the corpus.")
    ] = 0,
    num_shards: Annotated[
        int | None, typer.Option(min=1, help="Shares of the work, such as the tasks of a SLURM array.")
    ] = None,
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
        typer.Option(
            help="Folder where relative paths of pictures start; those of HTML, MMC4 and OBELICS may not leave it.",
            show_default="that of the input file",
        ),
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
    drop_duplicate_documents: Annotated[
        bool, typer.Option("--drop-duplicate-documents", help="Filter: keep the first of equal documents.")
    ] = False,
    drop_duplicate_images: Annotated[
        bool, typer.Option("--drop-duplicate-images", help="Filter: keep the first of equal pictures.")
    ] = False,
    min_characters: Annotated[int | None, typer.Option(min=1, help="text: drop documents with fewer.")] = None,
    max_characters: Annotated[int | None, typer.Option(min=1, help="text: drop documents with more.")] = None,
    min_alphabetic_words: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="text: drop documents in which a smaller share of words has letters."),
    ] = None,
    max_duplicate_lines: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="text: drop documents in which a larger share of lines is repeated."),
    ] = None,
    text_hook: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="text: a function of yours from str to str, the text to take instead, or None, to drop the document.",
        ),
    ] = None,
    max_shard_megabytes: Annotated[int, typer.Option(min=1, help="Size at which a picture shard is full.")] = 1024,
    part_megabytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Input between two places where a killed command goes on and work may be divided.",
            show_default="text 64; .tar, .parquet 256; lists of pictures 4",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    from megatron_kosmos.data.packing.row_format import RowFormat
    from megatron_kosmos.data.preparation.preprocess import Preparation
    from megatron_kosmos.data.sources.input_format import InputFormat

    with _told_in_short():
        filters = _filters(
            max_images=max_images,
            halve_single_image=halve_single_image,
            min_image_side=min_image_side,
            drop_single_colour=drop_single_colour,
            drop_unusable_images=drop_unusable_images,
            drop_duplicate_documents=drop_duplicate_documents,
            drop_duplicate_images=drop_duplicate_images,
            min_characters=min_characters,
            max_characters=max_characters,
            min_alphabetic_words=min_alphabetic_words,
            max_duplicate_lines=max_duplicate_lines,
            text_hook=text_hook,
        )
    preparation = Preparation(
        kind=KINDS[context.info_name or ""],
        inputs=(*inputs, *(more_inputs or ())),
        output=output,
        tokenizer=tokenizer,
        num_workers=workers,
        strict=strict,
        filters=filters,
        row_format=RowFormat(sequence_length=sequence_length, num_latents=num_latents),
        input_format=InputFormat(
            text_field=text_field,
            image_field=image_field,
            caption_field=caption_field,
            image_folder=image_folder,
        ),
        max_shard_bytes=max_shard_megabytes << 20,
        part_bytes=None if part_megabytes is None else part_megabytes << 20,
        overwrite=overwrite,
    )
    if shard_index >= (num_shards or 1):
        raise typer.BadParameter(f"--shard-index {shard_index} is not below --num-shards {num_shards or 1}")
    with _told_in_short():
        _run(preparation, shard_index, num_shards)


def _filters(*, text_hook: str | None, **options: "int | float | bool | None") -> "Filters":
    """Return the filters. Raises DataError for a hook that is not to be had and for options that leave no text."""
    from pydantic import ValidationError

    from megatron_kosmos.data.errors import DataError
    from megatron_kosmos.data.filters import Filters
    from megatron_kosmos.data.preparation.text_filters import describe_hook

    try:
        if text_hook is not None:
            sys.path.insert(0, str(Path.cwd()))  # where a hook of one's own lies; workers get the path, too
        return Filters.model_validate(options | {"text_hook": text_hook and describe_hook(text_hook)})
    except ValidationError as error:
        raise DataError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def merge(output: Output, overwrite: Overwrite = False) -> None:
    """Make the corpus of the parts that all shards wrote."""
    from megatron_kosmos.data.preparation.preprocess import merge

    with _told_in_short():
        print_report(output, merge(output, overwrite))


@contextmanager
def _told_in_short() -> Iterator[None]:
    """End the process with the message of an error that the user can mend."""
    from megatron_kosmos.data.errors import DataError

    try:
        yield
    except DataError as error:
        sys.exit(f"kosmos preprocess: {error}")


def _run(preparation: "Preparation", shard_index: int, num_shards: int | None) -> None:
    """Prepare a corpus, or a share of one, under a progress bar and say what came of it. Raises DataError."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_kosmos.data.preparation.preprocess import prepare, prepare_shard

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
    )
    console, output = Console(stderr=True), preparation.output
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(output.name, total=None, documents=0)

        def show(done: int, total: int, documents: int) -> None:
            progress.update(task, completed=done, total=total, documents=documents)

        if num_shards is not None:
            parts = prepare_shard(preparation, shard_index, num_shards, show)
            has_work = bool(parts)
        else:
            manifest, has_work = prepare(preparation, show), True
        was_finished = progress.tasks[task].total is None
    if has_work and was_finished:
        console.print(f"{output} was finished before; there was nothing to do", markup=False, soft_wrap=True)
    elif num_shards is not None:
        done = f"parts {parts.start} to {parts.stop - 1}" if parts else "there are fewer parts than shards: none"
        console.print(
            f"{done}; when all {num_shards} shards are done: kosmos preprocess merge --output {output}",
            markup=False,
            soft_wrap=True,
        )
    if num_shards is None:
        print_report(output, manifest)
