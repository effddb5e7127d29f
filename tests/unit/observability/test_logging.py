"""Every rank's messages reach its own file; only rank 0 speaks on the console."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_kosmos.observability.logging import log_path, start_logging, stop_logging

logger = logging.getLogger("megatron_kosmos.engine.trainer")


@pytest.fixture(autouse=True)
def _restores_logging() -> Iterator[None]:
    yield
    stop_logging()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("rank, speaks", [(0, True), (3, False)])
def test_rank_0_alone_speaks_on_the_console(tmp_path: Path, console: Console, rank: int, speaks: bool) -> None:
    start_logging(tmp_path, rank, console)
    logger.info("step [bold]1[/bold] of %d", 7)
    assert ("step [bold]1[/bold] of 7" in shown(console)) is speaks
    line = log_path(tmp_path, rank).read_text()
    assert f"rank {rank} INFO megatron_kosmos.engine.trainer: step [bold]1[/bold] of 7\n" in line


def test_a_table_of_80_columns_fits_a_console_of_80(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    start_logging(tmp_path, 0, console)
    row = "decoder".ljust(74, ".") + "[/bar]"
    logger.info("parameters\n%s\n%s", row, row)
    first, *rest = shown(console).splitlines()
    assert first.split()[1:] == ["INFO", "parameters"]
    assert rest == [row, row]


def test_starting_again_replaces_the_destinations(tmp_path: Path, console: Console) -> None:
    start_logging(tmp_path / "first", 0, console)
    start_logging(tmp_path / "second", 0, console)
    logger.info("hello")
    assert log_path(tmp_path / "first", 0).read_text() == ""
    assert shown(console).count("hello") == 1


def test_a_resumed_run_appends_to_its_log(tmp_path: Path, console: Console) -> None:
    for message in ("before", "after"):
        start_logging(tmp_path, 0, console)
        logger.info(message)
        stop_logging()
    lines = log_path(tmp_path, 0).read_text().splitlines()
    assert [line.rsplit(": ")[-1] for line in lines] == ["before", "after"]


def test_other_libraries_are_left_alone(tmp_path: Path, console: Console) -> None:
    start_logging(tmp_path, 0, console)
    logging.getLogger("deepspeed").warning("not ours")
    assert "not ours" not in shown(console)
    assert log_path(tmp_path, 0).read_text() == ""
