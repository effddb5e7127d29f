"""Jobs on a real SLURM: what disturbs a run leaves no trace in its losses."""

import signal

import pytest

from tests.slurm.cluster import until
from tests.slurm.conftest import STEPS
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_the_job_of_64_gpus_is_accepted(run: Run) -> None:
    """Held back, so that SLURM checks and keeps it without starting it."""
    job = run.submit(STEPS, NODES="8", GPUS_PER_NODE="8", CONFIG="configs/kosmos1_64gpu.yaml", SBATCH_EXTRA="--hold")
    properties = job.properties()
    assert (properties["NumNodes"], properties["TresPerNode"]) == ("8-8", "gres:gpu:8")
    assert (properties["JobState"], properties["Requeue"], properties["TimeLimit"]) == ("PENDING", "1", "00:30:00")
    assert properties["StdOut"].startswith(f"{run.folder}/logs/")


def test_two_nodes_train_and_a_finished_run_does_not_start_again(undisturbed: Run) -> None:
    series = undisturbed.series()
    assert [step for step, *_ in series] == list(range(1, STEPS + 1))
    assert len({loss for _, loss, *_ in series}) == STEPS
    written = (undisturbed.folder / "metrics.jsonl").stat().st_mtime_ns
    again = undisturbed.submit(STEPS)
    assert again.finish() == "COMPLETED"
    assert (undisturbed.folder / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_signal_and_a_crash_leave_no_trace(run: Run, undisturbed: Run) -> None:
    job = run.submit(STEPS)
    run.reach(6, job)
    job.signal()
    until(lambda: job.restarts == 1, "put back into the queue after the signal")
    saved = run.checkpoints()[-1]
    assert len(run.series()) == saved
    run.reach(saved + 5, job)
    run.signal_rank(2, signal.SIGKILL)
    assert job.finish() == "COMPLETED"
    assert job.restarts == 2
    assert run.series() == undisturbed.series()
    assert f"saved and stopped at step {saved}; back into the queue" in job.log
    assert "failure 1 in a row without a new checkpoint" in job.log
