"""Read last: what the tests before it started is gone, and so is what the cluster was made of."""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def processes_of(cluster: Cluster) -> list[str]:
    """Command lines of living processes that belong to the cluster, but for this one's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            variables = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if line and str(cluster.folder) in line + variables:
            found.append(line)
    return found


def test_jobs_leave_nothing_and_the_cluster_neither(cluster: Cluster, undisturbed: Run) -> None:
    cluster.clear()
    training = [line for line in processes_of(cluster) if "megatron_kosmos" in line]
    assert training == []
    assert {path.name for path in cluster.temporary.iterdir()} <= {"torchinductor_root"}  # torch's cache, to be kept
    assert undisturbed.processes() == []
    assert processes_of(cluster) != []  # the look-up finds what is there
    cluster.down()
    assert processes_of(cluster) == []
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(cluster.folder) in line]
    interfaces = subprocess.run(["ip", "-o", "link"], text=True, capture_output=True, check=True).stdout
    namespaces = subprocess.run(["ip", "netns"], text=True, capture_output=True, check=True).stdout
    assert "ksbr0" not in interfaces
    assert "ksv" not in interfaces
    assert "ks-kosmos" not in namespaces
    assert sorted(path.name for path in cluster.folder.iterdir() if path.is_dir()) == ["log", "tmp"]
