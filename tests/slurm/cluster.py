"""A real SLURM cluster of eight nodes with eight pretended GPUs each on this machine, and jobs on it."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED"}
PATIENCE_SECONDS = 600
"""How long anything may take on a machine that others use too; only what hangs gets there."""


def until(happened: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait till something happened; raise AssertionError that says what did not."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    cluster: "Cluster"
    number: str

    def properties(self) -> dict[str, str]:
        """What `scontrol show job` tells."""
        words = self.cluster.call("scontrol", "show", "job", "-o", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.properties()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.properties()["Restarts"])

    @property
    def log(self) -> str:
        """What the job wrote so far."""
        path = Path(self.properties()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def finish(self, seconds: float = PATIENCE_SECONDS) -> str:
        """Wait for its end and return its state; what it wrote stands in the output of a failed test."""
        try:
            until(lambda: self.state in ENDED, f"the end of job {self.number}", seconds)
        finally:
            print(self.log)
        return self.state

    def signal(self) -> None:
        """Do what SLURM does for --signal=B:USR1 before the time limit."""
        self.cluster.call("scancel", "--signal=USR1", "--batch", self.number)


@dataclass
class Cluster:
    """The cluster while it is up."""

    folder: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        # Nothing of what others may have set: neither for SLURM nor for the scripts.
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        self.temporary = self.folder / "tmp"
        self.environment = kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "ENV_FILE": "/dev/null",  # nor a person's own launch/env.sh
            "VENV": str(ROOT / ".venv"),
        }

    def up(self) -> None:
        """Start it. Raises CalledProcessError where SLURM does not start."""
        self._control("up")
        self.temporary.mkdir()

    def down(self) -> None:
        """End it and everything that runs on it."""
        self._control("down")

    def crash(self, node: str) -> None:
        """Cut the node's power."""
        self._control("crash", node)

    def boot(self, node: str) -> None:
        """Bring a crashed node back."""
        self._control("boot", node)

    def call(self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Run a command as a user of the cluster and return what it printed; a failure shows what it said."""
        result = subprocess.run(
            command,
            env=self.environment | dict(environment or {}),
            cwd=cwd,
            text=True,
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
        return result.stdout

    def job(self, number: str) -> Job:
        return Job(self, number)

    def idle_nodes(self) -> int:
        """Count the nodes that could take a job."""
        return len(self.call("sinfo", "-h", "-N", "-p", "train", "-t", "idle", "-o", "%N").split())

    def clear(self) -> None:
        """Cancel every job and wait till all nodes are idle."""
        self.call("scancel", "--user=root")
        until(lambda: self.idle_nodes() == 8, "all nodes idle")

    def _control(self, command: str, *arguments: str) -> None:
        # Not captured: what it starts keeps the pipe open.
        subprocess.run(["bash", SCRIPT, command, self.folder, *arguments], check=True, timeout=PATIENCE_SECONDS)
