"""The real launcher over the real command: what torchrun does at SIGTERM and after a hang, and what is then left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_kosmos.checkpoint.folders import finished_steps
from megatron_kosmos.engine.ending import read_ending
from tests.end_to_end.lives import CONFIG, RANKS, children, is_running, prepare_settings, series

pytestmark = [pytest.mark.distributed, pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny run that reads with worker processes."""
    settings = prepare_settings(tmp_path_factory.mktemp("data"))
    return [*settings, "data.num_workers=1", "checkpoint.every=0", "health.watchdog_seconds=5"]


def start(run_dir: Path, settings: list[str]) -> subprocess.Popen[str]:
    """Start the run under torchrun, which gives its processes five seconds to end."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    command = ("--shutdown-timeout=5", "-m", "megatron_kosmos", "train", "--config", str(CONFIG))
    return subprocess.Popen(
        [*launcher, *command, *settings, f"run_dir={run_dir}"], stderr=subprocess.PIPE, text=True, cwd=CONFIG.parents[1]
    )


def ranks_after_steps(agent: subprocess.Popen[str], run_dir: Path, number: int) -> list[int]:
    """Wait until so many steps are done; return the processes of the ranks, first to last."""
    while not (run_dir / "metrics.jsonl").exists() or len(series(run_dir)) < number:
        assert agent.poll() is None, agent.communicate()[1]
        time.sleep(0.01)
    return children(agent.pid)


def test_sigterm_to_torchrun_saves_and_leaves_nothing_behind(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    agent = start(run_dir, [*settings, "training.steps=1000000"])
    ranks = ranks_after_steps(agent, run_dir, 3)
    processes = ranks + [worker for rank in ranks for worker in children(rank)]
    assert len(processes) == 2 * RANKS
    agent.terminate()
    _, said = agent.communicate()
    assert read_ending(run_dir) == "interrupted", said
    assert finished_steps(run_dir / "checkpoints") == [len(series(run_dir))]
    assert not [process for process in processes if is_running(process)]

    steps = len(series(run_dir)) + 1
    agent = start(run_dir, [*settings, f"training.steps={steps}"])
    assert (agent.wait(), read_ending(run_dir), len(series(run_dir))) == (0, "finished", steps)


def test_torchrun_ends_what_a_hang_leaves(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    agent = start(run_dir, [*settings, "training.steps=1000000"])
    ranks = ranks_after_steps(agent, run_dir, 3)
    os.kill(ranks[0], signal.SIGSTOP)
    _, said = agent.communicate()
    assert agent.returncode == 1
    assert f"pid {ranks[0]}" in (run_dir / "hang" / "summary.txt").read_text()
    assert f"rank 0 ({os.uname().nodename}, pid {ranks[0]}) in step" in said
    assert read_ending(run_dir) is None
    assert not [rank for rank in ranks if is_running(rank)]
