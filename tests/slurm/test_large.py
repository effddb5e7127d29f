"""What takes many processes or much time: 64 ranks in preflight, 16 in training, and a soak."""

import pytest

from tests.slurm import faults
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.nightly, pytest.mark.timeout(10800)]


def test_preflight_of_64_ranks_and_its_all_reduce(run: Run) -> None:
    """Training is not reached: 64 processes of the whole stack don't fit a small machine, of torch alone they do."""
    job = run.submit(
        10,
        "data.train=[{kind: text, prefix: /none}]",
        NODES="8",
        GPUS_PER_NODE="8",
        PREFLIGHT="1",
        PREFLIGHT_OPTIONS="--cpu --timeout 600",
    )
    assert job.finish(3600) == "FAILED"
    assert "64" in job.log


def test_eight_nodes_of_two_ranks(run: Run) -> None:
    calm = Run(run.cluster, run.data, run.folder.with_name("undisturbed"))
    assert calm.submit(20, NODES="8").finish(3600) == "COMPLETED"
    job = run.submit(20, NODES="8")
    run.reach(6, job)
    job.signal()
    assert (job.finish(3600), job.restarts) == ("COMPLETED", 1)
    assert run.series() == calm.series()
    assert len(calm.series()) == 20


def test_a_soak_of_300_steps_and_20_faults(run: Run) -> None:
    undisturbed = Run(run.cluster, run.data, run.folder.with_name("undisturbed"))
    calm = undisturbed.submit(300)
    assert calm.finish(3600) == "COMPLETED"
    job = run.submit(300, MAX_FAILURES="10", MAX_RESTARTS="1000")
    done = faults.disturb_again_and_again(run, job, num_faults=20, seed=0)
    assert job.finish(3600) == "COMPLETED"
    assert len(done) == 20
    assert run.series() == undisturbed.series()
    assert not list((run.folder / "checkpoints").glob(".*"))
