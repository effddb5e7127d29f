"""`kosmos generate`: text from a prompt and pictures, by an exported model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.prompt import CAPTION_PROMPT


def register(app: typer.Typer) -> None:
    """Add the command `generate`."""
    app.command("generate")(generate)


def generate(  # noqa: PLR0913, PLR0917 - one parameter an option
    model: Annotated[Path, typer.Option(help="Folder that `kosmos convert to-hf` wrote.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture; again for more, in order of the prompt's <image>.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Text to go on with. <image> says where a picture goes; without it they come first.")
    ] = CAPTION_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    num_beams: Annotated[
        int, typer.Option(min=1, help="Beams of the search; 1 is greedy, the paper captions with 5.")
    ] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[
        float, typer.Option(min=1e-3, help="With --sample: below 1 is safer, above is wilder.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="With --sample: probability mass to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample: the same seed draws the same text.")] = 0,
) -> None:
    """Print what the model writes after the pictures and the prompt."""
    quiet_libraries()
    from megatron_kosmos.engine.generate import Generator, Sampling, read_picture

    sampling = Sampling(temperature, top_p, seed) if sample else None
    try:
        pictures = [read_picture(path) for path in image or []]
        (text,) = Generator.load(model).generate([prompt], [pictures], max_new_tokens, num_beams, sampling)
    except (ValueError, OSError) as error:
        sys.exit(f"kosmos generate: {error}")
    typer.echo(text)
