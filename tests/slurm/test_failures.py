"""Everything that ends a job on a cluster, each against the undisturbed run's series."""

import signal
from pathlib import Path

import pytest

from tests.slurm import faults
from tests.slurm.cluster import Job, until
from tests.slurm.conftest import STEPS
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.nightly, pytest.mark.timeout(3600)]


def finish_like(run: Run, job: Job, undisturbed: Run, least_restarts: int = 1) -> None:
    assert job.finish(1800) == "COMPLETED"
    assert job.restarts >= least_restarts
    assert run.series() == undisturbed.series()


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_leaves_no_trace(fault: object, run: Run, undisturbed: Run) -> None:
    job = run.submit(STEPS)
    run.reach(6, job)
    assert callable(fault)
    fault(run, job)
    finish_like(run, job, undisturbed)
    saves = fault in (faults.preempt, faults.ask_to_stop)
    assert ("saved and stopped at step" in job.log) == saves


def test_a_node_that_does_not_return_is_replaced(run: Run, undisturbed: Run) -> None:
    job = run.submit(STEPS)
    run.reach(6, job)
    lost = faults.cut_power_of(run.cluster, job, 1)
    try:
        finish_like(run, job, undisturbed)
        assert lost not in run.cluster.call("scontrol", "show", "hostnames", job.properties()["NodeList"]).split()
    finally:
        run.cluster.boot(lost)


def test_the_time_limit(run: Run, undisturbed: Run) -> None:
    """SLURM itself says, 1795 s before it, that the limit is near: soon after the start. Then it is put off."""
    job = run.submit(STEPS, TIME="00:30:00", SIGNAL_SECONDS="1795")
    until(lambda: job.restarts >= 1, "put back into the queue")
    run.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=120")
    assert "got USR1" in job.log
    finish_like(run, job, undisturbed)


def test_a_frozen_rank_is_found_by_the_watchdog(run: Run, undisturbed: Run) -> None:
    job = run.submit(STEPS, "health.watchdog_seconds=15")
    run.reach(6, job)
    run.signal_rank(3, signal.SIGSTOP)
    finish_like(run, job, undisturbed)
    assert list((run.folder / "hang").rglob("*"))


def test_a_full_disk(run: Run, undisturbed: Run) -> None:
    small = Run(run.cluster, run.data, run.cluster.folder / "small" / "run")
    job = small.submit(STEPS)
    small.reach(6, job)
    filler = faults.fill(small.folder)
    until(lambda: job.restarts >= 1, "the failure to save")
    filler.unlink()
    finish_like(small, job, undisturbed)


def test_a_bad_node_is_named_and_the_job_ends(run: Run) -> None:
    """The run's folder isn't shared on one of two nodes: another disk lies over it there."""
    run.folder.mkdir()
    faults.inside(run.cluster, "kosmos2", "mount", "-t", "tmpfs", "not-shared", str(run.folder))
    try:
        job = run.submit(STEPS, PREFLIGHT="1", SBATCH_EXTRA="--nodelist=kosmos1,kosmos2")
        assert job.finish() == "FAILED"
    finally:
        faults.inside(run.cluster, "kosmos2", "umount", str(run.folder))
    assert job.restarts == 0
    assert "kosmos2" in job.log.split("newest checkpoint")[1]
    assert run.series() == []


def test_a_node_that_does_not_know_the_first_one_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    faults.inside(run.cluster, "kosmos4", "mount", "--bind", str(tmp_path / "hosts"), "/etc/hosts")
    try:
        job = run.submit(STEPS, SBATCH_EXTRA="--nodelist=kosmos3,kosmos4")
        assert job.finish() == "FAILED"
    finally:
        faults.inside(run.cluster, "kosmos4", "umount", "/etc/hosts")
    assert "the name of the first node, kosmos3, does not resolve on: kosmos4" in job.log


def test_a_refused_run_and_its_chain_end(run: Run) -> None:
    first = run.submit(STEPS, "data.train=[{kind: text, prefix: /none}]", CHAIN="2")
    assert (first.finish(), first.restarts) == ("FAILED", 0)
    assert "refused; running it again would end the same way" in first.log
    second = run.cluster.job(str(int(first.number) + 1))
    assert second.finish() == "FAILED"
    assert "the job before this one was refused" in second.log


def test_failures_without_progress_end(run: Run) -> None:
    """Interpreters that cannot start."""
    job = run.submit(STEPS, PYTHON="/bin/false", MAX_FAILURES="2")
    assert (job.finish(), job.restarts) == ("FAILED", 2)
    assert "failure 3 in a row without a new checkpoint, MAX_FAILURES=2: it ends here" in job.log


def test_a_cancelled_job_saves_and_stays_cancelled(run: Run, undisturbed: Run) -> None:
    job = run.submit(STEPS)
    run.reach(6, job)
    run.cluster.call("scancel", job.number)
    until(lambda: job.state not in {"RUNNING", "COMPLETING"}, "the job's end")
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    steps = len(run.series())
    assert run.checkpoints()[-1] == steps
    finish_like(run, run.submit(STEPS), undisturbed, least_restarts=0)


def test_deepspeed_as_launcher(run: Run, undisturbed: Run) -> None:
    job = run.submit(STEPS, LAUNCHER="deepspeed")
    run.reach(6, job)
    job.signal()
    finish_like(run, job, undisturbed)
    assert "saved and stopped at step" in job.log
