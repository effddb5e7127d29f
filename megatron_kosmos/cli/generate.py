"""`kosmos generate`: text from a prompt and pictures, or from a file of them, by an exported or a training model."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.cli.tensor_ranks import tensor_ranks
from megatron_kosmos.prompt import CAPTION_PROMPT

if TYPE_CHECKING:
    from megatron_kosmos.engine.generate import Decoding, Generator
    from megatron_kosmos.engine.prompt_file import PromptFile


def register(app: typer.Typer) -> None:
    """Add the command `generate`."""
    app.command("generate")(generate)


def generate(  # noqa: PLR0913, PLR0917 - one parameter an option
    model: Annotated[Path, typer.Option(help="Folder that `kosmos convert to-hf` wrote, or a run, or a checkpoint.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture; again for more, in order of the prompt's <image>.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text to go on with. <image> says where a picture goes; without it they come first.",
            show_default=CAPTION_PROMPT,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='Many instead: a file with {"prompt": ..., "images": [paths], "id": ...} in each line.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="With --prompts: file to write answers to, one a line; otherwise they are printed."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --prompts: end at the first bad line or picture.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="With --prompts: most prompts in a batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    num_beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy, the paper captions with 5.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="With beams: above 0 favours long answers.")] = 1.0,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="With --sample: below 1 is safer, above is wilder.", show_default="1.0")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="With --sample: probability mass to draw from.", show_default="1.0")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="With --sample: likeliest tokens to draw from; 0 is all.", show_default="0")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --sample: the same seed draws the same text.", show_default="0")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text of one prompt as it is made.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="With a run or checkpoint: tokenizer folder, if not where the run had it.")
    ] = None,
) -> None:
    """Print what the model writes after pictures and a prompt; --prompts does many, in batches.

    A run or checkpoint whose model several processes share (tensor parallelism, under any layout it was trained in):
    torchrun --nproc-per-node 2 -m megatron_kosmos generate --model runs/mine …
    """
    quiet_libraries()
    from megatron_kosmos.engine.generate import Decoding, Generator, Sampling
    from megatron_kosmos.engine.prompt_file import PromptFile

    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    drawing: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    misplaced = {
        "--prompts brings prompts and pictures; leave out --prompt and --image": prompts
        and (prompt is not None or image),
        "--stream prints the text of one prompt; leave out --prompts": prompts and stream,
        "--output, --overwrite and --strict go with --prompts": not prompts and (output or overwrite or strict),
        f"--{', --'.join(drawing).replace('_', '-')} needs --sample": drawing and not sample,
    }
    try:
        with tensor_ranks("generate") as ranks:
            for problem, is_there in misplaced.items():
                if is_there:
                    raise ValueError(problem)
            is_trained = ranks.size > 1 or tokenizer is not None
            load = partial(Generator.load_trained, tokenizer=tokenizer) if is_trained else Generator.load
            decoding = Decoding(max_new_tokens, num_beams, length_penalty, Sampling(**drawing) if sample else None)
            if prompts is None:
                _answer_one(load(model), CAPTION_PROMPT if prompt is None else prompt, image or [], decoding, stream)
                return
            lines = PromptFile.read(prompts)
            if output is not None and output.exists():
                if not overwrite:
                    raise ValueError(f"{output} is there already; --overwrite replaces it")
                if output.samefile(prompts):
                    raise ValueError(f"{output} holds the prompts; write answers to another file")
            generator = load(model, max_batch_size=batch_size)
            target = output if ranks.is_first else None
            with nullcontext(sys.stdout) if target is None else target.open("w", encoding="utf-8") as file:
                _answer_many(generator, lines, decoding, strict, file)
    except (ValueError, OSError) as error:
        sys.exit(f"kosmos generate: {error}")


def _answer_one(generator: "Generator", prompt: str, images: list[Path], decoding: "Decoding", stream: bool) -> None:
    if not stream:
        typer.echo(generator.generate([prompt], [images], decoding)[0])
        return
    from megatron_kosmos.engine.generate import Request

    def show(piece: str) -> None:
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    generator.stream(Request(prompt, images), show, decoding)
    typer.echo()


def _answer_many(generator: "Generator", lines: "PromptFile", decoding: "Decoding", strict: bool, file: TextIO) -> None:
    num_errors = 0
    with _progress(len(lines), is_shown=file is not sys.stdout or not sys.stdout.isatty()) as tell:
        for record in lines.answers(generator, decoding, strict, tell):
            num_errors += "error" in record
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    if num_errors:
        typer.echo(f'{num_errors} of {len(lines)} lines have an "error" in place of a text', err=True)
    if num_errors == len(lines):
        raise ValueError(f"nothing could be generated from {lines.path}")


@contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Callable[[], None]]:
    """Give what moves a bar on by one; `is_shown`: it does not disturb what is printed in the same terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown) as progress:
        task = progress.add_task("prompts", total=total)
        yield lambda: progress.advance(task)
