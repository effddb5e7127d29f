"""What a layer may touch: the import graph, torch, the environment and the network's self-contained export."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_kosmos"


def package_files(below: Path = PACKAGE) -> list[Path]:
    return sorted(below.rglob("*.py"))


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, cwd=cwd, check=False)


@pytest.mark.parametrize("module", ["megatron_kosmos.config", "megatron_kosmos.prompt", "megatron_kosmos.cli.main"])
def test_importing_it_does_not_load_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'megatron', 'deepspeed', 'transformers'}} & set(sys.modules)))"
    )
    result = run(sys.executable, "-c", code)
    assert result.stdout == "[]\n", result.stderr or result.stdout


@pytest.mark.parametrize(
    "module, statement",
    [
        ("model/wrong.py", "import megatron_kosmos.data"),
        ("parallel/wrong.py", "from megatron_kosmos import engine"),
        ("config/wrong.py", "import torch"),
        ("data/loading/wrong.py", "import megatron_kosmos.data.preparation"),
        ("wrong.py", ""),
    ],
    ids=["a sibling", "a layer above", "torch in config", "preparation in loading", "a module outside the layers"],
)
def test_import_linter_objects_to(tmp_path: Path, module: str, statement: str) -> None:
    """The contracts of pyproject.toml, run on a package with one offence in it."""
    for name in ("__init__.py", "__main__.py", "prompt.py", "batch.py", "tensor_file.py"):
        write(tmp_path / "megatron_kosmos" / name)
    for layer in ("cli", "engine", "model", "data", "optim", "checkpoint", "hf", "parallel", "observability", "config"):
        write(tmp_path / "megatron_kosmos" / layer / "__init__.py")
    for path in (PACKAGE / "data").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            write(tmp_path / "megatron_kosmos" / "data" / path.name / ("" if path.suffix else "__init__.py"))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    lint = (
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    )
    clean = run(*lint, cwd=tmp_path)
    assert clean.returncode == 0, clean.stdout

    write(tmp_path / "megatron_kosmos" / module, statement)
    offended = run(*lint, cwd=tmp_path)
    assert offended.returncode == 1, offended.stdout


def write(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def environment_reads(source: str) -> Iterator[int]:
    """Yield the lines that use the process's environment."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for name in node.names if name.name in {"environ", "getenv", "putenv"})


def test_environment_is_read_in_cli_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in package_files()
        if PACKAGE / "cli" not in path.parents
        for line in environment_reads(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['A']", "import os as o\no.getenv('A')", "from os import environ"]
)
def test_environment_reads_are_seen(source: str) -> None:
    assert list(environment_reads(source))


def imported_modules(source: str) -> set[str]:
    """Return the top-level packages that `source` imports by absolute name."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


def test_code_that_is_copied_into_an_export_needs_only_public_libraries() -> None:
    """`*_kosmos.py` in hf/ are loaded by transformers with trust_remote_code, where this package may not exist."""
    remote_code = sorted((PACKAGE / "hf").glob("*_kosmos.py"))
    assert remote_code
    for path in remote_code:
        assert not imported_modules(path.read_text()) & {"megatron_kosmos", "megatron", "deepspeed"}, path


def test_nothing_is_unpickled() -> None:
    offences = ("import pickle", "weights_only=False", "allow_pickle=True", "pickle.load")
    found = [(path, text) for path in package_files() for text in offences if text in path.read_text()]
    assert found == []
