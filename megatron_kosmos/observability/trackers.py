"""Services beside the run's own folder that get its metrics too; whatever becomes of them, training goes on.

Each is talked to by a thread of its own, which loads its library, connects, and takes the metrics from a queue. What a
service misses stands in metrics.jsonl.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from queue import Full, Queue
from threading import Thread
from time import monotonic
from typing import Final, Protocol

from megatron_kosmos.config import ConfigError, LoggingConfig, RunConfig

logger = logging.getLogger(__name__)

QUEUE_LINES: Final = 10_000
"""Lines of metrics that wait for a slow service; later ones are dropped."""
RETRY_SECONDS: Final = 60.0
"""How long a service is left alone after a failure."""
CLOSE_SECONDS: Final = 10.0
"""How long the end of a run waits for a service: torchrun gives a rank that it stops 30 s in all."""


class Tracker(Protocol):
    """One run at a service. Every method may raise anything, and may take as long as the service does."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the metrics of a step, by their grouped names."""

    def finish(self, is_complete: bool) -> None:
        """Say that the run is over, with all of its steps or not."""


class TrackerThread:
    """Sends metrics to one service without ever holding up the caller."""

    def __init__(self, service: str, num_steps: int, connect: Callable[[], Tracker]) -> None:
        """The run has `num_steps` in all. `connect` runs in the thread, again after a failure."""
        self._service, self._num_steps, self._connect = service, num_steps, connect
        self._queue: Queue[tuple[int, dict[str, float]] | None] = Queue(QUEUE_LINES)
        self._tracker: Tracker | None = None
        self._retry_at, self._last_step, self._num_lost = 0.0, 0, 0
        # A daemon: a service that hangs must not keep the process.
        self._thread = Thread(target=self._send_all, name=f"metrics to {service}", daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Have the metrics of a step sent; returns at once."""
        try:
            self._queue.put_nowait((step, dict(scalars)))
        except Full:
            self._num_lost += 1

    def close(self) -> None:
        """Wait for what is pending, `CLOSE_SECONDS` at most."""
        try:
            self._queue.put_nowait(None)
        except Full:
            self._num_lost += self._queue.qsize()
        else:
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s does not answer; it may lack the last metrics", self._service)
        if self._num_lost:
            logger.warning("%s lacks %d lines of metrics.jsonl", self._service, self._num_lost)

    def _send_all(self) -> None:
        while (line := self._queue.get()) is not None:
            if not self._attempt(partial(self._send, *line)):
                self._num_lost += 1
        if self._tracker is not None:
            self._attempt(partial(self._tracker.finish, self._last_step == self._num_steps))

    def _send(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._tracker is None:
            self._tracker = self._connect()
        self._tracker.log(step, scalars)
        self._last_step = step

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Return whether it went well. Libraries raise errors of every kind, SystemExit too."""
        if monotonic() < self._retry_at:
            return False
        try:
            act()
        except BaseException as error:
            self._retry_at = monotonic() + RETRY_SECONDS
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning(
                "%s gets no metrics for now (next try in %.0f s): %s", self._service, RETRY_SECONDS, first_line
            )
            return False
        return True


def check_trackers_installed(logging_config: LoggingConfig) -> None:
    """Raise ConfigError where a service is asked for whose library is missing."""
    for service, settings in (("wandb", logging_config.wandb), ("mlflow", logging_config.mlflow)):
        if settings is not None and find_spec(service) is None:
            raise ConfigError(
                f"logging.{service} needs the package {service}, which is not installed: "
                f"pip install 'megatron-kosmos[{service}]', or set logging.{service}=null"
            )


def open_trackers(run: RunConfig) -> list[TrackerThread]:
    """Return a thread for each service that `run` names; on rank 0 only. Libraries are loaded in the threads."""
    threads = []
    if run.logging.wandb is not None:
        threads.append(TrackerThread("Weights & Biases", run.training.steps, lambda: _open_wandb(run)))
    if run.logging.mlflow is not None:
        threads.append(TrackerThread("MLflow", run.training.steps, lambda: _open_mlflow(run)))
    return threads


def _open_wandb(run: RunConfig) -> Tracker:
    from megatron_kosmos.observability.wandb_run import WandbRun

    assert run.logging.wandb is not None
    return WandbRun(run.logging.wandb, run)


def _open_mlflow(run: RunConfig) -> Tracker:
    from megatron_kosmos.observability.mlflow_run import MlflowRun

    assert run.logging.mlflow is not None
    return MlflowRun(run.logging.mlflow, run)
