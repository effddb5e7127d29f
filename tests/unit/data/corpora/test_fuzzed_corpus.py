"""Whatever the files of a prepared corpus say of themselves: an error that names one, no crash, no hang, no memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from tests.unit.data.sources.limited_reading import ROOT

UNCHECKED = {f"corpus{suffix}: other" for suffix in (".bin", "-images-00000.tar", "-images-00001.tar", ".images.idx")}
"""Tokens and pictures are not compared with their checksums when a corpus is opened, nor is which picture it is."""


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path, picture: Callable[..., bytes]) -> Path:
    copytree(tokenizer_folder, tmp_path / "fuzzed" / "tokenizer")
    (tmp_path / "fuzzed" / "plans").mkdir()
    for seed in range(4):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed))
    documents = [
        {
            "text": f"document {number}" + "<image> and text" * (number % 4),
            "images": [f"{number % 4}.png"] * (number % 4),
        }
        for number in range(24)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    output = tmp_path / "fuzzed" / "corpus" / "corpus"
    prepare(Preparation("interleaved", (file,), output, tokenizer_folder, max_shard_bytes=20_000))
    return tmp_path / "fuzzed"


def fuzz(folder: Path, first: int, last: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.unit.data.corpora.fuzzed_corpus", str(folder), str(first), str(last)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes: dict[str, int] = json.loads(result.stdout)
    told = {outcome for outcome in outcomes if outcome.endswith((": refused", ": same"))}
    assert set(outcomes) - told <= UNCHECKED
    assert sum(outcomes.values()) == last - first
    assert sum(number for outcome, number in outcomes.items() if outcome.endswith("refused")) > (last - first) // 2
    return outcomes


def test_damaged_files(folder: Path) -> None:
    outcomes = fuzz(folder, 0, 300)
    files = {f"{path.name}: refused" for path in (folder / "corpus").iterdir() if path.suffix != ".tar"}
    assert files | {"tokenizer.model: refused", "kosmos_tokenizer.json: refused", "k-epoch0.plan: same"} <= set(
        outcomes
    )


@pytest.mark.nightly
def test_many_damaged_files(folder: Path) -> None:
    fuzz(folder, 1000, 4000)
