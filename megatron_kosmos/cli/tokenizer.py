"""`kosmos tokenizer`: train a tokenizer, import one, look into one."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

Newlines = Annotated[
    Literal["auto", "line", "collapse", "keep"],
    typer.Option(
        help="Write a newline as the token </line>, make it a space, or keep it as byte-level models do; auto keeps it "
        "there, and otherwise writes </line> when training and a space when importing."
    ),
]
Output = Annotated[Path, typer.Option(help="Folder to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    commands = typer.Typer(help="Make a tokenizer with <image> </image>.", no_args_is_help=True)
    commands.command("train")(train)
    commands.command("import")(import_)
    commands.command("inspect")(inspect)
    app.add_typer(commands, name="tokenizer")


def train(  # noqa: PLR0913 - a command's parameters are its options
    *,
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            help='.txt, .jsonl with {"text": …} a line (both also .gz or .zst), or .parquet.',
        ),
    ],
    output: Output,
    vocab_size: Annotated[int, typer.Option(min=1, help="Ids, special tokens and 256 bytes included.")],
    more_inputs: Annotated[
        list[Path] | None, typer.Argument(help="More inputs, so that `--input *.txt` works.")
    ] = None,
    model_type: Annotated[
        Literal["unigram", "bpe", "byte-bpe"],
        typer.Option(help="Kind of model: sentencepiece's, or byte-level BPE as GPT-2's."),
    ] = "unigram",
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    newlines: Newlines = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Threads; another number may choose other pieces.")] = 16,
) -> None:
    """Train a tokenizer on text, with the special tokens at ids 0 to 6."""
    from megatron_kosmos.data.sources.documents import read_texts
    from megatron_kosmos.data.sources.input_format import InputFormat
    from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer

    policy = None if newlines == "auto" else newlines
    settings = TrainingSettings(vocab_size, model_type=model_type, newlines=policy, num_threads=threads)
    with _told_plainly():
        names = InputFormat(text_field=text_field)
        texts = (text for file in (*inputs, *(more_inputs or ())) for text in read_texts(file, names))
        tokenizer = train_tokenizer(texts, settings)
        tokenizer.save(output)
    _describe(tokenizer, output)


def import_(
    model: Annotated[
        Path, typer.Argument(help="A sentencepiece .model, a tokenizer.json, or a Hugging Face folder with one.")
    ],
    output: Output,
    newlines: Newlines = "auto",
    bos_is_eos: Annotated[
        bool, typer.Option("--bos-is-eos", help="Begin documents with </s>, if the model has no <s> (T5, Falcon).")
    ] = False,
    numbering: Annotated[
        Literal["auto", "plain", "fairseq"],
        typer.Option(help="Ids: as in the model, or XLM-R's; auto goes by the name sentencepiece.bpe.model."),
    ] = "auto",
) -> None:
    """Take over a T5, XLM-R, Falcon, GPT-2 or other model and add the special tokens that it lacks."""
    from megatron_kosmos.data.tokenization.making import import_tokenizer

    with _told_plainly():
        policy = None if newlines == "auto" else newlines
        tokenizer = import_tokenizer(model, policy, bos_is_eos, None if numbering == "auto" else numbering)
        tokenizer.save(output)
    _describe(tokenizer, output)


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a tokenizer.")],
    text: Annotated[str | None, typer.Option(help="Show how this text is encoded.")] = None,
) -> None:
    """Print what a tokenizer is."""
    from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

    with _told_plainly():
        tokenizer = KosmosTokenizer.load(folder)
    _describe(tokenizer, folder)
    if text is not None:
        ids = tokenizer.encode(text)
        typer.echo(f"{len(ids)} tokens: {ids}")
        typer.echo(" | ".join(tokenizer.decode([number], skip_special=False) for number in ids))


@contextmanager
def _told_plainly() -> Generator[None]:
    """End the process with the message alone when data cannot be used."""
    from megatron_kosmos.data.errors import DataError

    try:
        yield
    except DataError as error:
        sys.exit(f"kosmos tokenizer: {error}")


def _describe(tokenizer: "KosmosTokenizer", folder: Path) -> None:
    tokens = sorted(tokenizer.settings.special_tokens.items(), key=lambda item: item[1])
    typer.echo(f"{folder}: {tokenizer.vocab_size} ids, newlines: {tokenizer.settings.newlines}")
    typer.echo("special tokens: " + "  ".join(f"{name} {number}" for name, number in tokens))
    typer.echo(f"fingerprint: {tokenizer.fingerprint}")
