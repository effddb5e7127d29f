"""A run that hangs ends by itself, with the stacks of all ranks that can and the names of those that are to blame."""

import os
import signal
from pathlib import Path

import pytest

from megatron_kosmos.engine.ending import read_ending
from tests.end_to_end.lives import RANKS, Life, children, is_running, prepare_settings, series

pytestmark = pytest.mark.distributed

HUNG = 70


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny run that waits for no more than eight seconds."""
    settings = prepare_settings(tmp_path_factory.mktemp("data"))
    return [
        *settings,
        "checkpoint.every=0",
        "data.num_workers=1",
        "health.watchdog_seconds=8",
        "training.steps=1000000",
    ]


def test_a_frozen_rank_is_named_and_the_others_end(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    life = Life(run_dir, settings)
    assert life.train_steps(2)
    os.kill(life.ranks[1], signal.SIGSTOP)
    assert os.waitstatus_to_exitcode(os.waitpid(life.ranks[0], 0)[1]) == HUNG
    os.kill(life.ranks[1], signal.SIGKILL)  # as torchrun does when one rank has failed
    os.waitpid(life.ranks[1], 0)

    said = life.said(0)
    assert "suspect is what does not answer" in said
    assert f"rank 1 ({os.uname().nodename}, pid {life.ranks[1]}) in step" in said
    assert (run_dir / "hang" / "summary.txt").read_text().splitlines()[1] in said
    stacks = (run_dir / "hang" / "rank_00000.txt").read_text()
    assert "most recent call first" in stacks
    assert "engine/trainer.py" in stacks
    assert not (run_dir / "hang" / "rank_00001.txt").exists()
    assert read_ending(run_dir) is None

    before = len(series(run_dir))
    life = Life(run_dir, [*settings, "health.watchdog_seconds=60", f"training.steps={before + 1}"])
    assert life.finish() == [0] * RANKS, life.said(0)  # what the hang has left does not bother it
    assert len(series(run_dir)) == before + 1


def test_a_loader_that_never_returns_is_found(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    life = Life(run_dir, settings)
    assert life.train_steps(2)
    workers = [child for rank in life.ranks for child in children(rank)]
    os.kill(children(life.ranks[1])[0], signal.SIGSTOP)
    codes = life.finish()
    assert HUNG in codes, life.said(0) + life.said(1)
    assert set(codes) <= {HUNG, 1}  # 1: a connection broke when the other was gone
    assert "suspect is what is behind the others" in life.said(0)
    assert f"rank 1 ({os.uname().nodename}, pid {life.ranks[1]}) in step" in life.said(0)
    assert "data\n" in life.said(0)
    assert life.said(1).count("suspect") == 0  # one rank speaks for all
    assert "data/loading/loader.py" in (run_dir / "hang" / "rank_00001.txt").read_text()
    assert "parallel/agreement.py" in (run_dir / "hang" / "rank_00000.txt").read_text()
    assert not [worker for worker in workers if is_running(worker)]
