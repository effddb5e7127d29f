"""How a run ended: the word in its folder."""

from pathlib import Path

import pytest

from megatron_kosmos.checkpoint.folders import complete_folder
from megatron_kosmos.engine.ending import ending_path, forget_ending, is_finished, read_ending, write_ending
from tests.distributed.tiny import tiny_run


def test_the_word_stands_in_the_first_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    assert read_ending(run_dir) is None
    write_ending(run_dir, "refused", "data.tokenizer=x\nis not there")
    assert ending_path(run_dir).read_text() == "refused\ndata.tokenizer=x\nis not there\n"
    assert read_ending(run_dir) == "refused"
    write_ending(run_dir, "finished", "")
    assert read_ending(run_dir) == "finished"
    assert [path.name for path in run_dir.iterdir()] == ["ended"]
    forget_ending(run_dir)
    forget_ending(run_dir)
    assert read_ending(run_dir) is None


@pytest.mark.parametrize("content", ["", "done\n", "finished early\n"])
def test_another_word_says_nothing(content: str, tmp_path: Path) -> None:
    ending_path(tmp_path).write_text(content)
    assert read_ending(tmp_path) is None


@pytest.mark.parametrize(
    "saved, steps, expected",
    [
        (10, 10, True),
        (10, 11, False),  # more steps are wanted now
        (None, 10, False),  # somebody has removed the checkpoints
    ],
)
def test_a_run_is_finished_when_it_has_its_steps(saved: int | None, steps: int, expected: bool, tmp_path: Path) -> None:
    """Whatever an earlier start has said: it may have been killed before it could, and the word may be removed."""
    if saved is not None:
        complete_folder(tmp_path / "checkpoints", saved).mkdir(parents=True)
    assert is_finished(tiny_run(run_dir=str(tmp_path), training__steps=steps)) is expected
