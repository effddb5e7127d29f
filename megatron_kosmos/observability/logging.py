"""Where log messages go: every rank to a file of its own, rank 0 to the console too."""

import logging
from pathlib import Path
from typing import Final

from rich.console import Console, ConsoleRenderable, Group
from rich.logging import RichHandler
from rich.text import Text
from rich.traceback import Traceback

PACKAGE_LOGGER: Final = "megatron_kosmos"
LINE_FORMAT: Final = "%(asctime)s rank %(rank)d %(levelname)s %(name)s: %(message)s"


def log_path(run_dir: Path, rank: int) -> Path:
    """Return the log file of `rank`."""
    return run_dir / "logs" / f"rank_{rank:05d}.log"


def start_logging(run_dir: Path, rank: int, console: Console) -> None:
    """Send what the package logs to `log_path(run_dir, rank)` (appending) and, on rank 0, to `console`.

    A second call replaces the destinations of the first. Modules log through `logging.getLogger(__name__)`; other
    libraries' loggers are left alone.
    """
    stop_logging()
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter(LINE_FORMAT, defaults={"rank": rank}))
    logger = logging.getLogger(PACKAGE_LOGGER)
    logger.setLevel(logging.INFO)
    logger.addHandler(to_file)
    if rank == 0:
        logger.addHandler(_ConsoleHandler(console=console, show_path=False, markup=False, log_time_format="[%X]"))
    # A message that reached its rank's own destinations must not come again through the root logger.
    logger.propagate = False


def stop_logging() -> None:
    """Close the destinations that `start_logging` opened."""
    logger = logging.getLogger(PACKAGE_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


class _ConsoleHandler(RichHandler):
    """Puts a message's further lines at the left edge: beside time and level a table of 80 columns would be torn."""

    def render(
        self, *, record: logging.LogRecord, traceback: Traceback | None, message_renderable: ConsoleRenderable
    ) -> ConsoleRenderable:
        first, newline, rest = record.getMessage().partition("\n")
        if not newline:
            return super().render(record=record, traceback=traceback, message_renderable=message_renderable)
        return Group(super().render(record=record, traceback=traceback, message_renderable=Text(first)), Text(rest))
