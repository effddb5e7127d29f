"""Killed with SIGKILL at any moment and run again, preparation ends with the files of an undisturbed run."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.preprocess import Preparation, merge, prepare, prepare_shard
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.preparation.part_inputs import files_in, make_inputs

ROOT = Path(__file__).parents[4]
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""What Python reports to audit hooks before it changes files."""


def run_in_process(work: Callable[[], object], folder: Path, killed_at: int | None = None) -> int:
    """Do `work` in a process of its own; kill it just before it touches a file below `folder` for the n-th time.

    Returns how many times it was about to.
    """
    touched = multiprocessing.get_context("fork").Value("q", 0)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            if touched.value == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            touched.value += 1

    def watched() -> None:
        sys.addaudithook(hook)  # for good: hence the process
        work()

    process = multiprocessing.get_context("fork").Process(target=watched)
    process.start()
    process.join()
    assert process.exitcode == (0 if killed_at is None else -signal.SIGKILL)
    return int(touched.value)


class Interruption:
    """A replacement of a corpus with pictures, in a few parts and without duplicates, to be killed."""

    def __init__(self, folder: Path, tokenizer: Path, picture: Callable[..., bytes]) -> None:
        inputs = make_inputs(folder / "in", "caption", picture)
        self.old = Preparation("caption", inputs[1:2], folder / "out" / "corpus", tokenizer, max_shard_bytes=1)
        filters = Filters(drop_duplicate_images=True, drop_duplicate_documents=True)
        self.wanted = replace(
            self.old, inputs=inputs, max_shard_bytes=4000, part_bytes=9000, filters=filters, overwrite=True
        )
        self.folder = self.old.output.parent
        self.start_again()
        self.num_events_of_parts = run_in_process(lambda: prepare_shard(self.wanted, 0, 1), self.folder)
        self.start_again()
        self.num_events = run_in_process(lambda: prepare(self.wanted), self.folder)
        self.expected = files_in(self.folder)

    def start_again(self) -> None:
        """Bring the folder to the old corpus and nothing else."""
        subprocess.run(["rm", "-rf", self.folder], check=True)
        prepare(self.old)

    def test(self, moments: list[int], work: Callable[[], object]) -> None:
        """Kill `work` at each of `moments`, then let it end."""
        self.start_again()
        for moment in moments:
            run_in_process(work, self.folder, moment)
        work()
        assert files_in(self.folder) == self.expected
        assert not [path for path in self.folder.rglob("*") if path.is_dir()]


@pytest.fixture(scope="module")
def interruption(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, picture: Callable[..., bytes]
) -> Interruption:
    return Interruption(tmp_path_factory.mktemp("interrupted"), tokenizer_folder, picture)


@pytest.mark.parametrize("stage", ["first part", "parts", "assembly", "renaming"])
def test_a_killed_preparation_is_finished_by_the_next(interruption: Interruption, stage: str) -> None:
    parts, end = interruption.num_events_of_parts, interruption.num_events
    stages = {
        "first part": range(2, parts // 4),
        "parts": range(parts // 4, parts),
        "assembly": range(parts, (parts + end) // 2),
        "renaming": range((parts + end) // 2, end),
    }
    moment = random.Random().choice(stages[stage])  # another one each day
    print(f"killed before its file operation {moment} of {end}")  # told by pytest when it fails
    interruption.test([moment], lambda: prepare(interruption.wanted))


NUM_STRIPES = 20
"""The moments are dealt out to so many tests, each of a few minutes."""


@pytest.mark.nightly
@pytest.mark.parametrize("stripe", range(NUM_STRIPES))
def test_every_moment_between_two_file_operations(interruption: Interruption, stripe: int) -> None:
    assert interruption.num_events > 100
    for moment in range(stripe, interruption.num_events, NUM_STRIPES):
        interruption.test([moment], lambda: prepare(interruption.wanted))
    draw = random.Random(stripe)
    moments = [draw.randrange(20), draw.randrange(20), draw.randrange(10)]
    interruption.test(moments, lambda: prepare(interruption.wanted))  # one that cleans up is killed as well


@pytest.mark.nightly
@pytest.mark.parametrize("stripe", range(NUM_STRIPES))
def test_every_moment_of_a_merge(interruption: Interruption, stripe: int) -> None:
    wanted = interruption.wanted
    moments = range(interruption.num_events - interruption.num_events_of_parts)
    for moment in moments[stripe::NUM_STRIPES]:
        interruption.start_again()
        for shard in range(3):
            prepare_shard(wanted, shard, 3)
        run_in_process(lambda: merge(wanted.output, overwrite=True), interruption.folder, moment)
        merge(wanted.output, overwrite=True)
        assert files_in(interruption.folder) == interruption.expected


COMMANDS: dict[SourceKind, str] = {"text": "text", "caption": "captions"}


class Command:
    """The command on many files, and what it writes when it is left alone."""

    def __init__(self, folder: Path, kind: SourceKind, tokenizer: Path, picture: Callable[..., bytes]) -> None:
        inputs = [str(file) for file in make_inputs(folder / "in", kind, picture)]
        self._command = [sys.executable, "tools/preprocess_data.py", COMMANDS[kind], "--tokenizer", str(tokenizer)]
        self._command += ["--workers", "2", "--part-megabytes", "1", "--drop-duplicate-documents", "--input"]
        self._command += inputs * (400 if kind == "text" else 100)
        began = time.monotonic()
        assert self.start(folder / "expected").wait() == 0
        self.seconds = time.monotonic() - began
        self.expected = files_in(folder / "expected")

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Run it."""
        return subprocess.Popen([*self._command, "--output", str(folder / "corpus")], cwd=ROOT)


@pytest.fixture(scope="module", params=COMMANDS)
def command(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    picture: Callable[..., bytes],
) -> Command:
    return Command(tmp_path_factory.mktemp(request.param), request.param, tokenizer_folder, picture)


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(5))
def test_five_kills_of_the_command_at_random_times(command: Command, tmp_path: Path, attempt: int) -> None:
    """Fifty in all: five in five tests of two kinds."""
    draw, kills = random.Random(), 0
    while kills < 5:
        process = command.start(tmp_path / "out")
        try:
            process.wait(draw.uniform(0, command.seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            assert files_in(tmp_path / "out") == command.expected
            subprocess.run(["rm", "-rf", tmp_path / "out"], check=True)
    assert command.start(tmp_path / "out").wait() == 0
    assert files_in(tmp_path / "out") == command.expected
