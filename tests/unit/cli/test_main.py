"""The `kosmos` command as users start it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kosmos import __version__
from megatron_kosmos.cli import main

MODULES = {path.stem for path in Path(main.__file__).parent.glob("*.py") if "def register(" in path.read_text("utf-8")}


def kosmos(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "megatron_kosmos", *arguments)
    return subprocess.run(command, text=True, capture_output=True, check=False)


def test_every_module_beside_it_is_registered() -> None:
    registered = {command.__name__.rpartition(".")[2] for command in main.COMMANDS}
    assert registered == MODULES


def test_help_lists_every_command() -> None:
    result = kosmos("--help")
    assert result.returncode == 0, result.stderr
    for module in MODULES:
        assert f" {module} " in result.stdout


def test_version_is_the_packages() -> None:
    assert kosmos("--version").stdout == f"megatron-kosmos {__version__}\n"


@pytest.mark.parametrize("arguments", [("nonsense",), ("--nonsense",)])
def test_a_wrong_word_is_an_error_of_use(arguments: tuple[str, ...]) -> None:
    result = kosmos(*arguments)
    assert result.returncode == 2
    assert "nonsense" in result.stderr
    assert "Traceback" not in result.stderr
