"""What befalls a job on a cluster, done to it for real."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import Cluster, Job, until
from tests.slurm.runs import Run


def preempt(run: Run, job: Job) -> None:
    """Let a job of higher priority take all nodes for a moment."""
    arguments = ("--partition=urgent", "--nodes=8", "--exclusive", "--output=/dev/null", "--wrap=true")
    number = run.cluster.call("sbatch", "--parsable", *arguments).strip()
    until(lambda: run.cluster.job(number).state == "COMPLETED", "the urgent job's end")


def ask_to_stop(run: Run, job: Job) -> None:
    """Send what SLURM sends before the time limit."""
    job.signal()


def kill_a_rank(run: Run, job: Job) -> None:
    """Kill one process of the training."""
    run.signal_rank(2, signal.SIGKILL)


def cut_power_of(cluster: Cluster, job: Job, index: int) -> str:
    """Kill everything on a node of the job, and return its name."""
    name = cluster.call("scontrol", "show", "hostnames", job.properties()["NodeList"]).split()[index]
    cluster.crash(name)
    return name


def lose_a_node_for_a_while(run: Run, job: Job) -> None:
    """Cut the power of the job's second node and turn it on again."""
    run.cluster.boot(cut_power_of(run.cluster, job, 1))


def lose_the_first_node_for_a_while(run: Run, job: Job) -> None:
    """Cut the power of the node that runs the job script and turn it on again."""
    run.cluster.boot(cut_power_of(run.cluster, job, 0))


FAULTS: tuple[Callable[[Run, Job], None], ...] = (
    preempt,
    ask_to_stop,
    kill_a_rank,
    lose_a_node_for_a_while,
    lose_the_first_node_for_a_while,
)


def disturb_again_and_again(run: Run, job: Job, num_faults: int, seed: int) -> list[str]:
    """Do random things to a run, each after it went on for some steps; return what was done."""
    draw = random.Random(seed)
    done: list[str] = []
    metrics = run.folder / "metrics.jsonl"
    before = None
    for _ in range(num_faults):
        # A run that starts writes its metrics anew.
        until(lambda: metrics.exists() and metrics.stat().st_ino != before, f"a start after {done}")  # noqa: B023
        run.reach(len(run.series()) + draw.randint(2, 9), job)
        before, restarts = metrics.stat().st_ino, job.restarts
        fault = draw.choice(FAULTS)
        done.append(fault.__name__)
        print(f"fault {len(done)}: {fault.__name__} at step {len(run.series())}", flush=True)
        fault(run, job)
        until(lambda: job.restarts > restarts, f"back in the queue after {done}")  # noqa: B023
    return done


def inside(cluster: Cluster, node: str, *command: str) -> None:
    """Run a command in a node's namespaces."""
    (first,) = Path(f"/proc/{node_process(cluster, node)}/task").glob("*/children")
    child = first.read_text().split()[0]
    subprocess.run(["nsenter", "-t", child, "-m", "-p", "-u", "-n", *command], check=True, timeout=60)


def node_process(cluster: Cluster, node: str) -> int:
    return int((cluster.folder / "run" / f"{node}.pid").read_text())


def fill(folder: Path) -> Path:
    """Write a file that leaves no room on the disk of `folder`."""
    path = folder / "filler"
    with path.open("wb") as filler:
        free = os.statvfs(folder)
        os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_frsize)
    return path
