"""The `kosmos` command: an application that gathers the sub-commands of the command modules beside it.

Each of them defines `register(app)` and loads torch inside its command only, so that `kosmos --help` answers at once.
"""

import sys
from types import ModuleType
from typing import Annotated

import typer

from megatron_kosmos import __version__
from megatron_kosmos.cli import convert, doctor, evaluate, generate, inspect, preprocess, status, tokenizer, train
from megatron_kosmos.config import ConfigError

COMMANDS: tuple[ModuleType, ...] = (tokenizer, preprocess, inspect, doctor, train, status, evaluate, convert, generate)
"""Modules with a `register(app)`, in the order of `kosmos --help`."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron-kosmos {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """Return the application with every sub-command registered."""
    app = typer.Typer(
        name="kosmos",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def kosmos(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Prepare data for, train, evaluate and export KOSMOS-1-style multimodal language models."""

    for command in COMMANDS:
        command.register(app)
    return app


def main() -> None:
    """Run the command line; an error that the user can mend is told in its own words, without a traceback."""
    try:
        build_app()()
    except ConfigError as error:
        sys.exit(f"kosmos: {error}")
