"""A full disk ends preparation with the file and the bytes; what is done stays, and a rerun finishes the rest."""

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_kosmos.data.corpora.hashed_file import HashedFile, told_when_full
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from tests.unit.data.preparation.part_inputs import files_in

ROOT = Path(__file__).parents[4]
WriteLines = Callable[[str, Sequence[str]], Path]


def test_a_device_without_room(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    file = HashedFile(tmp_path / "full")
    with pytest.raises(
        DataError, match=r"no room for .*full \(No space left on device\): it needs 9,000,000 bytes by now"
    ):
        file.write(bytes(9_000_000))
    file.abandon()
    small = HashedFile(tmp_path / "full")
    small.write(b"is buffered")
    with pytest.raises(DataError, match="it needs 11 bytes by now, 0 are there, "):
        small.close()
    small.abandon()


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), told_when_full(tmp_path):
        raise PermissionError(errno.EACCES, "not yours")


def test_a_rerun_goes_on(write_lines: WriteLines, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a limit, which the second part, but not the first, would have to."""
    texts = ["short", f"very long {'word ' * 4000}"]
    short, long = (json.dumps({"text": text}) for text in texts)
    file = write_lines("a.jsonl", [short, *["bad" * 20_000] * 18, *[long] * 10])
    wanted = Preparation("text", (file,), tmp_path / "out" / "corpus", tokenizer_folder, part_bytes=1 << 20)
    tool = [sys.executable, "tools/preprocess_data.py", "text", "--part-megabytes", "1", "--input", str(file)]
    command = [*tool, "--output", str(wanted.output), "--tokenizer", str(tokenizer_folder)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"kosmos preprocess: no room for {wanted.output}.parts/000001.partial-" in result.stderr
    assert "run the same command again, and it goes on from there" in result.stderr
    parts = wanted.output.with_name("corpus.parts")
    assert sorted(path.name for path in parts.iterdir()) == ["000000", "job.json"]
    done = parts.joinpath("000000", "tokens.bin").stat().st_ino

    kept: list[int] = []
    prepare(wanted, lambda *counts: kept.append(parts.joinpath("000000", "tokens.bin").stat().st_ino))
    assert set(kept) == {done}
    expected = Preparation("text", (file,), tmp_path / "expected" / "corpus", tokenizer_folder, part_bytes=1 << 20)
    prepare(expected)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "expected")
