"""What takes many processes or much time: 64 ranks in preflight, 16 in training, and a soak."""

import re

import pytest

from tests.slurm import faults
from tests.slurm.cluster import until
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.nightly, pytest.mark.timeout(10800)]


def test_preflight_of_64_ranks_and_its_all_reduce(run: Run) -> None:
    """Training is not waited for: 64 processes of torch fit a small machine, of the whole stack they don't."""
    options = {"PREFLIGHT": "1", "PREFLIGHT_OPTIONS": "--cpu --timeout 600"}
    job = run.submit(10, "training.global_batch_size=64", NODES="8", GPUS_PER_NODE="8", **options)
    until(lambda: "fit to train" in job.log or job.state == "FAILED", "the doctor's word", 1800)
    run.cluster.call("scancel", "--signal=KILL", "--full", job.number)
    run.cluster.call("scancel", job.number)
    print(job.log)
    assert re.search(r"all-reduce +ok", job.log)
    assert "8 x 8 processes" in job.log


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
