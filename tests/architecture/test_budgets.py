"""Files and functions stay small enough to read: counted here and, for functions, by ruff."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 300
NAMES_THAT_SAY_NOTHING = {"utils.py", "helpers.py", "common.py", "misc.py"}


def python_files() -> list[Path]:
    folders = ("megatron_kosmos", "tools", "tests", "benchmarks", "launch")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_longer_than_300_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_file_names_say_what_is_inside() -> None:
    assert [path for path in python_files() if path.name in NAMES_THAT_SAY_NOTHING] == []


STATEMENTS = "\n".join(f"    x = {i}" for i in range(41))


@pytest.mark.parametrize(
    "code, rule",
    [
        (f"def f() -> None:\n{STATEMENTS}\n", "PLR0915"),
        ("def f(a, b, c, d, e, f, g): ...\n", "PLR0913"),
        ("class C:\n    def f(self, a, b, c, d, e, f): ...\n", None),
    ],
    ids=["41 statements", "7 parameters", "6 parameters and self"],
)
def test_ruff_holds_the_budgets_of_functions(code: str, rule: str | None) -> None:
    """At most 40 statements and 6 parameters besides self, as pyproject.toml sets for `ruff check`."""
    command = [sys.executable, "-m", "ruff", "check", "--select=PLR0913,PLR0915", "--output-format=concise", "-"]
    result = subprocess.run(command, input=code, text=True, capture_output=True, cwd=ROOT, check=False)
    assert (rule in result.stdout) if rule else result.returncode == 0, result.stdout


def test_the_rules_of_the_budgets_are_switched_on() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "PL" in lint["select"]
    assert not {"PLR", "PLR0913", "PLR0915"} & set(lint["ignore"])
    assert "per-file-ignores" not in lint
