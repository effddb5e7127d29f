"""`python tools/preprocess_data.py text|captions|interleaved …`: the same as `kosmos preprocess`."""

import typer

from megatron_kosmos.cli.preprocess import register

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    register(app)
    app()
