"""`kosmos convert`: training checkpoints to Hugging Face folders, and models from elsewhere to training checkpoints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_kosmos.cli.libraries import quiet_libraries

if TYPE_CHECKING:
    from megatron_kosmos.engine.conversion import ConversionReport

Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")]
Verify = Annotated[bool, typer.Option(help="Compare the logits of both models; write nothing if they differ.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")]
RunSettings = Annotated[
    Path | None,
    typer.Option(help="YAML with the settings of the run to make; without it OUTPUT/config.yaml is a start to edit."),
]


def register(app: typer.Typer) -> None:
    """Add the command group `convert`."""
    convert = typer.Typer(help="Turn training checkpoints into Hugging Face models and back.", no_args_is_help=True)
    convert.command("to-hf")(to_hf)
    convert.command("from-hf")(from_hf)
    convert.command("from-torchscale")(from_torchscale)
    app.add_typer(convert, name="convert")


def to_hf(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A checkpoint folder, or a run (its newest one).")],
    output: Output,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, where the run's own is not at its place any more.")
    ] = None,
    format: Annotated[
        Literal["kosmos", "kosmos2"],
        typer.Option(help="Class of the model: our own, or transformers' Kosmos-2, which needs its settings."),
    ] = "kosmos",
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Write a folder that transformers loads: weights, processor, code (trust_remote_code=True) and model card."""
    quiet_libraries()
    from megatron_kosmos.engine import convert

    options = convert.ExportOptions(format=format, tokenizer=tokenizer, verify=verify, overwrite=overwrite)
    _report(lambda: convert.to_hf(source, output, options), output)


def from_hf(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A folder of `to-hf`, or of a stock Kosmos-2.")],
    output: Output,
    config: RunSettings = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Write a run folder whose checkpoint at step 0 has the weights: `kosmos train --config OUTPUT/config.yaml`."""
    quiet_libraries()
    from megatron_kosmos.engine import from_hf as conversion

    options = conversion.ImportOptions(config=config, verify=verify, overwrite=overwrite)
    _report(lambda: conversion.from_hf(source, output, options), output)


def from_torchscale(
    source: Annotated[Path, typer.Argument(metavar="STATE_DICT", help="What torch.save wrote of model.state_dict().")],
    output: Output,
    torchscale_config: Annotated[Path, typer.Option(help="JSON with the arguments of torchscale's DecoderConfig.")],
    config: Annotated[Path, typer.Option(help="YAML of the run to make, such as configs/kosmos_x.yaml.")],
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Write a run folder with the weights of a Kosmos-X model, torchscale's decoder with its vision side."""
    quiet_libraries()
    from megatron_kosmos.engine import from_torchscale as conversion

    options = conversion.TorchscaleOptions(torchscale_config, config, verify=verify, overwrite=overwrite)
    _report(lambda: conversion.from_torchscale(source, output, options), output)


def _report(convert: Callable[[], "ConversionReport"], output: Path) -> None:
    """Run a conversion and say what came of it; errors that the user can mend end the process in their own words."""
    from megatron_kosmos.checkpoint.errors import CheckpointError

    try:
        report = convert()
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"kosmos convert: {error}")
    typer.echo(f"{report.source} (step {report.step}, {report.num_parameters:,} parameters) -> {output}")
    if report.max_abs_logit_diff is None:
        typer.echo("the logits of the two models were not compared")
    else:
        typer.echo(
            f"largest difference of logits: {report.max_abs_logit_diff:.3g} (at most {report.bound:.0e} allowed)"
        )
