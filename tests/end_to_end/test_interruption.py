"""A run that is asked to stop saves the very step, says so, and goes on as if it had never stopped."""

import os
import random
import signal
from pathlib import Path

import pytest

from megatron_kosmos.checkpoint.folders import finished_steps, leftovers
from megatron_kosmos.engine.ending import ending_path, read_ending
from tests.end_to_end.lives import RANKS, Life, children, prepare_settings, series

pytestmark = pytest.mark.distributed

INTERRUPTED = [75] * RANKS


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny run that reads with worker processes, and saves at its end only."""
    settings = prepare_settings(tmp_path_factory.mktemp("data"))
    return [*settings, "checkpoint.every=0", "data.num_workers=1", "training.steps=12"]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """The series of a run that nobody stops."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    life = Life(run_dir, settings)
    assert life.finish() == [0] * RANKS, life.said(0)
    assert read_ending(run_dir) == "finished"
    return series(run_dir)


def interrupt(life: Life, number: signal.Signals, rank: int, also_workers: bool) -> None:
    """Send a signal to one rank, or to all processes of it, as torchrun's agent does."""
    for process in (*(children(life.ranks[rank]) if also_workers else ()), life.ranks[rank]):
        os.kill(process, number)


def assert_is_saved(run_dir: Path, life: Life) -> None:
    """What must hold after an interruption: a checkpoint of the last step whose metrics are there."""
    assert life.finish() == INTERRUPTED, life.said(0) + life.said(1)
    assert read_ending(run_dir) == "interrupted"
    done = len(series(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
    assert finished_steps(run_dir / "checkpoints")[:1] == [done] * (done > 0)
    assert not leftovers(run_dir / "checkpoints")


def test_it_goes_on_as_if_it_had_never_stopped(
    settings: list[str], undisturbed: list[tuple[float, ...]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    draw = random.Random(os.getpid())
    for number, rank, also_workers in ((signal.SIGTERM, 0, True), (signal.SIGUSR1, 1, False)):
        life = Life(run_dir, settings)
        assert life.train_steps(draw.randint(1, 4))
        interrupt(life, number, rank, also_workers)
        assert_is_saved(run_dir, life)
        assert "stopped after step" in life.said(0)
        assert 0 < len(series(run_dir)) < len(undisturbed)
    life = Life(run_dir, settings)
    assert life.finish() == [0] * RANKS, life.said(0)
    assert (read_ending(run_dir), series(run_dir)) == ("finished", undisturbed)

    before = (run_dir / "metrics.jsonl").stat()
    ending_path(run_dir).unlink()  # as the script of a job does
    life = Life(run_dir, settings)
    assert (life.finish(), life.said(0), life.said(1)) == (
        [0] * RANKS,
        f"kosmos train: {run_dir} has all its 12 steps: nothing to do\n",
        "",
    )
    assert (run_dir / "metrics.jsonl").stat() == before
    assert read_ending(run_dir) == "finished"


def test_a_second_interrupt_ends_at_once(settings: list[str], tmp_path: Path) -> None:
    """The first one of a terminal, which all ranks get, is as a SIGTERM; the second finds no handler any more."""
    run_dir = tmp_path / "run"
    life = Life(run_dir, [*settings, "training.steps=1000000"])
    assert life.train_steps(1)
    codes: dict[int, int] = {}
    while len(codes) < RANKS:
        for rank in set(range(RANKS)) - set(codes):
            os.kill(life.ranks[rank], signal.SIGINT)
            process, status = os.waitpid(life.ranks[rank], os.WNOHANG)
            if process:
                codes[rank] = os.waitstatus_to_exitcode(status)
    assert set(codes.values()) <= {-signal.SIGINT, 1}  # 1: the other was gone before the second came
    assert read_ending(run_dir) is None


@pytest.mark.parametrize("settings_of_two", [["optimizer.learning_rat=1"], ["training.global_batch_size=3"]])
def test_a_mistake_is_marked_as_refused(settings: list[str], settings_of_two: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    life = Life(run_dir, [*settings, *settings_of_two])
    assert life.finish() == [1] * RANKS
    assert read_ending(run_dir) == "refused"
    word, _, details = ending_path(run_dir).read_text().partition("\n")
    assert (word, f"kosmos train: {details}") == ("refused", life.said(0))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_signals_at_any_moment(settings: list[str], undisturbed: list[tuple[float, ...]], tmp_path: Path) -> None:
    """In the start, amid a step, amid a save, twice: always saved, and in the end the undisturbed series."""
    run_dir, draw = tmp_path / "run", random.Random(7)
    saving = [*settings, "checkpoint.every=1"]
    for turn in range(20):
        life = Life(run_dir, saving)
        rank, also_workers = draw.randrange(RANKS), draw.random() < 0.5
        number = draw.choice((signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))
        if turn % 3 == 0:
            while not (run_dir / "logs" / f"rank_{rank:05d}.log").exists():
                assert life.is_alive()
        elif turn % 3 == 1:
            life.train_steps(1)
        else:
            life.begin_saves(1)
        interrupt(life, number, rank, also_workers)
        if draw.random() < 0.5:
            interrupt(life, signal.SIGTERM, 1 - rank, also_workers)
        codes = life.finish()
        assert codes in (INTERRUPTED, [0] * RANKS), life.said(0) + life.said(1)
        assert read_ending(run_dir) == ("finished" if codes == [0] * RANKS else "interrupted")
        if codes == [0] * RANKS:
            break
    assert Life(run_dir, saving).finish() == [0] * RANKS
    assert series(run_dir) == undisturbed
