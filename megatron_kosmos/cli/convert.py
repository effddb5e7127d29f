"""`kosmos convert`: training checkpoints to Hugging Face folders."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_kosmos.cli.libraries import quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command group `convert`."""
    convert = typer.Typer(help="Turn training checkpoints into Hugging Face models.", no_args_is_help=True)
    convert.command("to-hf")(to_hf)
    app.add_typer(convert, name="convert")


def to_hf(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A checkpoint folder, or a run (its newest one).")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, where the run's own is not at its place any more.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the logits of both models; write nothing if they differ.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
) -> None:
    """Write a folder that transformers loads (trust_remote_code=True): weights, processor, code and model card."""
    quiet_libraries()
    from megatron_kosmos.checkpoint.errors import CheckpointError
    from megatron_kosmos.engine import convert

    options = convert.ExportOptions(tokenizer=tokenizer, verify=verify, overwrite=overwrite)
    try:
        report = convert.to_hf(source, output, options)
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"kosmos convert: {error}")
    typer.echo(f"{report.source} (step {report.step}, {report.num_parameters:,} parameters) -> {output}")
    if report.max_abs_logit_diff is None:
        typer.echo("logits were not compared with the training model's")
    else:
        typer.echo(
            f"largest difference of logits: {report.max_abs_logit_diff:.3g} (at most {report.bound:.0e} allowed)"
        )
