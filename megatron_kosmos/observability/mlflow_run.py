"""A run at MLflow, the same one after every resume."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from megatron_kosmos.config import MlflowConfig, RunConfig
from megatron_kosmos.observability.run_ids import read_run_id, write_run_id

PARAMS_A_REQUEST: Final = 100
LONGEST_PARAM: Final = 6000
"""MLflow's own limits."""


class MlflowRun:
    """A tracker (`trackers.Tracker`). The settings of the first start become its parameters."""

    def __init__(self, config: MlflowConfig, run: RunConfig) -> None:
        """Connect, and take up the run or make it."""
        self._client = MlflowClient(tracking_uri=config.tracking_uri)
        run_id = read_run_id(run.run_dir, "mlflow")
        if run_id is None:
            run_id = self._create(config, run)
            write_run_id(run.run_dir, "mlflow", run_id)
        self._run_id = run_id
        self._client.update_run(run_id, status="RUNNING")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(name, value, now, step) for name, value in scalars.items()]
        )

    def finish(self, is_complete: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, "FINISHED" if is_complete else "KILLED")

    def _create(self, config: MlflowConfig, run: RunConfig) -> str:
        experiment = self._client.get_experiment_by_name(config.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(config.experiment)
        run_id: str = self._client.create_run(experiment_id, run_name=run.run_dir.name).info.run_id
        settings = _flatten(run.model_dump(mode="json"))
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in settings]
        for first in range(0, len(params), PARAMS_A_REQUEST):
            self._client.log_batch(run_id, params=params[first : first + PARAMS_A_REQUEST])
        return run_id


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting under its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
