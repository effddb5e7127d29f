"""Weights & Biases and MLflow get a run's metrics, the same run after a resume, and cannot hold up or end a run."""

import logging
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
from mlflow import MlflowClient

from megatron_kosmos.config import ConfigError, LoggingConfig, MlflowConfig, RunConfig, WandbConfig
from megatron_kosmos.observability import trackers
from megatron_kosmos.observability.metrics import MetricsWriter
from megatron_kosmos.observability.trackers import TrackerThread, check_trackers_installed, open_trackers
from tests.distributed.tiny import tiny_run


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need long to load the libraries."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 120.0)


def write_steps(run: RunConfig, first: int, last: int) -> None:
    with MetricsWriter(run.run_dir, first, open_trackers(run)) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"loss": 10.0 / step, "lr": float("nan"), "mfu": None})


def test_mlflow_has_one_run_with_every_step_after_a_resume(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tiny_run(run_dir=str(tmp_path / "run"), training__steps=4, logging__mlflow={"tracking_uri": uri})
    client = MlflowClient(tracking_uri=uri)
    states = []
    for first, last in ((1, 2), (3, 4)):
        write_steps(run, first, last)
        experiment = client.get_experiment_by_name("kosmos")
        assert experiment is not None
        (recorded,) = client.search_runs([experiment.experiment_id])
        states.append(recorded.info.status)
    assert states == ["KILLED", "FINISHED"]
    assert recorded.data.params["training.steps"] == "4"
    history = client.get_metric_history(recorded.info.run_id, "loss/total")
    assert [(point.step, point.value) for point in history] == [(n, 10.0 / n) for n in range(1, 5)]


def test_wandb_goes_on_as_the_same_run_offline(tmp_path: Path) -> None:
    run = tiny_run(
        run_dir=str(tmp_path / "run"), training__steps=4, logging__wandb={"project": "kosmos", "mode": "offline"}
    )
    for first, last in ((1, 2), (3, 4)):
        write_steps(run, first, last)
    run_id = (run.run_dir / "wandb_run_id").read_text().strip()
    transactions = list((run.run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert transactions
    written = b"".join(path.read_bytes() for path in transactions)
    assert b"loss/total" in written
    assert b"2.5" in written, "the last step's loss"
    assert b"max_sequence_length" in written, "the settings"


def test_a_server_that_is_not_there_is_told_of_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tiny_run(run_dir=str(tmp_path / "run"), logging__mlflow={"tracking_uri": "http://127.0.0.1:9"})
    write_steps(run, 1, 5)
    assert len((run.run_dir / "metrics.jsonl").read_text().splitlines()) == 5
    failure, loss = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert failure.startswith("MLflow gets no metrics for now")
    assert loss == "MLflow lacks 5 lines of metrics.jsonl"


def test_a_service_that_hangs_holds_up_neither_a_step_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.01)
    never = Event()

    def connect() -> trackers.Tracker:
        never.wait()
        raise AssertionError

    thread = TrackerThread("Hanging", 2, connect)
    with caplog.at_level(logging.WARNING, trackers.__name__):
        thread.log(1, {"loss": 1.0})
        thread.log(2, {"loss": 1.0})
        thread.close()
    assert caplog.messages == ["Hanging does not answer; it may lack the last metrics"]
    never.set()


@pytest.mark.parametrize(
    "settings, service",
    [
        (LoggingConfig(wandb=WandbConfig(project="p")), "wandb"),
        (LoggingConfig(mlflow=MlflowConfig(tracking_uri="sqlite:///m.db")), "mlflow"),
    ],
)
def test_a_missing_package_is_refused_with_the_name_of_its_extra(
    settings: LoggingConfig, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers_installed(settings)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, service, raising=False)
    with pytest.raises(ConfigError, match=rf"logging\.{service} needs .* pip install 'megatron-kosmos\[{service}\]'"):
        check_trackers_installed(settings)


def test_the_services_are_loaded_only_where_they_are_wanted() -> None:
    """Other libraries load wandb and mlflow themselves where they are installed, but nothing is started by that."""
    ours = "megatron_kosmos.observability"
    code = (
        "import sys; import megatron_kosmos.engine.run;"
        f"assert not {{'{ours}.mlflow_run', '{ours}.wandb_run'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
