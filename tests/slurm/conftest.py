"""The cluster, its data, and the run that nothing disturbs: made once for all tests here."""

import faulthandler
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run, TinyData

STEPS = 24


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave hangs to each test's own timeout: the five minutes of pyproject.toml end pytest, and the cluster stays."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    data = TinyData(tmp_path_factory.mktemp("data"))
    data.make()
    return data


@pytest.fixture
def run(cluster: Cluster, data: TinyData, tmp_path: Path) -> Generator[Run]:
    """A new run; its jobs are gone after the test."""
    yield Run(cluster, data, tmp_path / "run")
    cluster.clear()


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """STEPS steps on two nodes of two ranks without an incident."""
    run = Run(cluster, data, tmp_path_factory.mktemp("undisturbed"))
    job = run.submit(STEPS)
    assert (job.finish(), job.restarts) == ("COMPLETED", 0)
    return run
