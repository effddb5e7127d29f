"""A run that is killed again and again has, in the end, the series of one that never was, and always a checkpoint."""

import faulthandler
import random
import time
from pathlib import Path

import pytest

from megatron_kosmos.checkpoint.folders import complete_folder, finished_steps, leftovers
from megatron_kosmos.checkpoint.load import find_latest, read_state, read_tensors
from tests.end_to_end.lives import RANKS, Life, prepare_settings, series

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny run."""
    return prepare_settings(tmp_path_factory.mktemp("data"))


def newest_checkpoint(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, having read every byte of it; 0 without one."""
    root = run_dir / "checkpoints"
    newest = find_latest(root)
    if newest is None:
        assert not finished_steps(root)
        return 0
    step = finished_steps(root)[0]
    assert newest == complete_folder(root, step)  # none that bears a name was passed over
    state = read_state(newest)
    assert (state["step"], len(dict(read_tensors(newest))) > 100) == (step, True)
    assert (root / "latest").exists() or step == 2
    return step


def kill_again_and_again(run_dir: Path, settings: list[str], num_kills: int, seed: int) -> int:
    """Start and kill a run; return how often amid a save."""
    draw = random.Random(seed)
    newest, kills_amid_saves = 0, 0
    for kill in range(num_kills):
        life = Life(run_dir, settings)
        if kill % 8 == 7:
            time.sleep(draw.uniform(0, 1.5))  # somewhere in the start
        elif kill % 2:
            assert life.begin_saves(draw.choice((1, 2, 2))), f"the run ended before kill {kill}, or failed"
            time.sleep(draw.choice((0, 0, 0.003, 0.03, 0.1, 0.3)))  # anywhere in the save, or behind it
        else:
            assert life.train_steps(draw.randint(1, 4)), f"the run ended before kill {kill}, or failed"
            time.sleep(draw.uniform(0, 0.1))  # about a step
        life.kill(draw)
        kills_amid_saves += bool(leftovers(run_dir / "checkpoints"))
        before, newest = newest, newest_checkpoint(run_dir)
        assert newest >= before
        assert newest <= len(series(run_dir))
        print(
            f"kill {kill + 1}: {len(series(run_dir))} steps, checkpoint {newest}, {kills_amid_saves} kills amid saves"
        )
    return kills_amid_saves


def assert_kills_leave_no_trace(settings: list[str], folder: Path, num_kills: int, seed: int) -> int:
    undisturbed = Life(folder / "undisturbed", settings)
    assert undisturbed.finish() == [0] * RANKS, (folder / "undisturbed_0.out").read_text()
    kills_amid_saves = kill_again_and_again(folder / "killed", settings, num_kills, seed)
    assert Life(folder / "killed", settings).finish() == [0] * RANKS, (folder / "killed_0.out").read_text()
    assert series(folder / "killed") == series(folder / "undisturbed")
    assert not leftovers(folder / "killed" / "checkpoints")
    return kills_amid_saves


def test_three_kills_leave_no_trace(settings: list[str], tmp_path: Path) -> None:
    assert_kills_leave_no_trace([*settings, "training.steps=16"], tmp_path, num_kills=3, seed=0)
    assert len(series(tmp_path / "killed")) == 16


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_hundred_kills_leave_no_trace(settings: list[str], tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # which pyproject.toml gives any test five minutes for
    long = [*settings, "training.steps=250"]
    assert assert_kills_leave_no_trace(long, tmp_path, num_kills=100, seed=1) > 5
    assert len(series(tmp_path / "killed")) == 250
