"""Numerical health: what becomes of a run whose losses or gradients are not finite, or whose loss jumps.

Every rank decides by the numbers that all have alike (`StepResult`), so all go on, go back or end together. What
happened stands in run_dir/health.jsonl, with the samples of the step.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch.distributed as dist

from megatron_kosmos.checkpoint.errors import SavingFailed
from megatron_kosmos.checkpoint.tensors import JSON
from megatron_kosmos.config import RunConfig
from megatron_kosmos.config.data import data_step
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.loading.loader import StepLoader
from megatron_kosmos.engine.callbacks import Checkpointing
from megatron_kosmos.engine.interruption import Interrupted
from megatron_kosmos.engine.rollbacks import Rollback, read_rollbacks, write_rollbacks
from megatron_kosmos.engine.trainer import Callback, StepReport
from megatron_kosmos.parallel.agreement import agree

logger = logging.getLogger(__name__)

EVENTS = "health.jsonl"
"""File of the run folder with a line for each step that was skipped or whose loss jumped."""

_DEVIATIONS_OF_MAD = 1.4826
"""A normal distribution's standard deviation in median distances from its median."""

_LEAST_DEVIATION = 1e-3
"""As a share of the median: losses that hardly differ have no spikes."""


class Unhealthy(Exception):
    """Training that would go on badly, and end the same way again; raised on all ranks alike."""


@dataclass
class History:
    """What a run remembers of its losses in every checkpoint: a resumed run decides as one that never stopped."""

    losses: deque[float]
    """The newest finite ones, as many as `health.spike_window`."""
    bad_steps_in_a_row: int = 0
    steps_skipped: int = 0
    """Since the start of the run."""

    @classmethod
    def of_checkpoint(cls, state: Mapping[str, Any], window: int) -> "History":
        """Return what a checkpoint's JSON says; without one, or in an older one, there is nothing to remember."""
        saved = dict(state.get("health", {}))
        return cls(deque(saved.pop("losses", ()), maxlen=window), **saved)

    def to_json(self) -> dict[str, JSON]:
        """Return what `of_checkpoint` takes."""
        return {
            "losses": list(self.losses),
            "bad_steps_in_a_row": self.bad_steps_in_a_row,
            "steps_skipped": self.steps_skipped,
        }

    def spike_bound(self, deviations: float) -> float:
        """Return the loss above which the next one is a spike (`health.spike_deviations`, not 0); infinity: none is."""
        if not deviations or len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        middle = median(self.losses)
        deviation = _DEVIATIONS_OF_MAD * median(abs(loss - middle) for loss in self.losses)
        return middle + deviations * max(deviation, _LEAST_DEVIATION * abs(middle))


class HealthMonitor(Callback):
    """Judges each step; before the metrics, so that they count it. `EndOfHealth` acts, behind them."""

    def __init__(self, run: RunConfig, history: History, checkpointing: Checkpointing, loader: StepLoader) -> None:
        """`checkpointing` knows where a roll-back leads, the `loader` of rank 0 where samples come from."""
        self.run, self.history, self.checkpointing, self.loader = run, history, checkpointing, loader
        self.verdict: Unhealthy | Rollback | None = None
        """What ends the run after this step."""

    def after_step(self, report: StepReport) -> None:
        """Count a skipped step or look for a spike, and write down what there is to tell."""
        result, history, health = report.result, self.history, self.run.health
        bound = history.spike_bound(health.spike_deviations)
        if result.is_skipped:
            history.steps_skipped += 1
            history.bad_steps_in_a_row += 1
            self._tell("skipped", report, {})
            if history.bad_steps_in_a_row >= health.max_bad_steps_in_a_row:
                self.verdict = self._too_many_bad_steps(report.step)
        elif result.num_targets:
            history.bad_steps_in_a_row = 0
            history.losses.append(result.sums.mean)
        is_spike = not result.is_skipped and result.sums.mean > bound
        if is_spike:
            self._tell("spike", report, {"bound": bound})
            if health.on_spike == "roll_back":
                self.verdict = self._rollback(report, bound)
        if report.is_due(self.run.logging.metrics_every) or report.scalars or result.is_skipped or is_spike:
            report.scalars["steps_skipped"] = history.steps_skipped

    def _too_many_bad_steps(self, step: int) -> Unhealthy:
        number = self.history.bad_steps_in_a_row
        return Unhealthy(
            f"loss or gradients of {number} steps in a row, up to step {step}, were not finite; the weights are still "
            f"those before them. {self.run.run_dir / EVENTS} has their samples, and kosmos inspect data shows them: "
            f"pass over them with data.skip_steps, lower optimizer.learning_rate, or raise "
            f"health.max_bad_steps_in_a_row={self.run.health.max_bad_steps_in_a_row}"
        )

    def _rollback(self, report: StepReport, bound: float) -> Rollback:
        """Pass over the data of this step and of `spike_skip_steps` in all, but none that the checkpoint has seen."""
        skip_steps, saved = self.run.data.skip_steps, self.checkpointing.saved_step
        last = data_step(report.step - 1, skip_steps) + 1
        unseen = data_step(saved - 1, skip_steps) + 2 if saved else 1
        first = max(last - self.run.health.spike_skip_steps + 1, unseen)
        return Rollback(
            step=report.step, loss=report.result.sums.mean, bound=bound, to_step=saved, skip_steps=(first, last)
        )

    def _tell(self, event: str, report: StepReport, details: Mapping[str, float]) -> None:
        """Log it, and add it with the step's samples to the file of events. On rank 0."""
        if dist.get_rank():
            return
        result, path = report.result, self.run.run_dir / EVENTS
        numbers = {"loss": result.sums.mean, "grad_norm": result.grad_norm, **details}
        told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        logger.warning("step %d: %s (%s); its samples are in %s", report.step, event, told, path)
        line: dict[str, Any] = {"event": event, "step": report.step}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            line |= {
                "data_step": data_step(report.step - 1, self.run.data.skip_steps) + 1,
                "samples": self.loader.origins(report.step - 1),
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except (OSError, DataError) as error:
            logger.warning("%s does not tell of step %d: %s", path, report.step, error)


class EndOfHealth(Callback):
    """Ends the run where the monitor says so: behind the metrics of the step, before its checkpoint."""

    def __init__(self, run: RunConfig, monitor: HealthMonitor) -> None:
        self.run, self.monitor = run, monitor

    def after_step(self, report: StepReport) -> None:
        """Raise Unhealthy, or Interrupted for a roll-back, which is written down first; on every rank alike.

        Raises SavingFailed, on every rank, if it cannot be.
        """
        verdict, device = self.monitor.verdict, self.monitor.checkpointing.runner.topology.device
        if verdict is None:
            return
        if isinstance(verdict, Unhealthy):
            raise verdict
        failure, limit, is_beyond = None, self.run.health.max_rollbacks, False
        if dist.get_rank() == 0:
            try:
                rollbacks = read_rollbacks(self.run.run_dir)
                is_beyond = len(rollbacks) >= limit
                if not is_beyond:
                    write_rollbacks(self.run.run_dir, [*rollbacks, verdict])
            except (OSError, ValueError) as error:
                failure = f"a roll-back cannot be written down: {error}"
        agreed = agree(failure, is_beyond, device)
        if agreed.failure is not None:
            raise SavingFailed(agreed.failure)
        if agreed.stopped_rank is not None:
            raise Unhealthy(
                f"{verdict}, and health.max_rollbacks={limit} are behind it. {self.run.run_dir / EVENTS} has the "
                f"samples of every spike: look at them with kosmos inspect data, lower optimizer.learning_rate, remove "
                f"the newest checkpoints to go further back, or raise health.max_rollbacks"
            )
        first, last = verdict.skip_steps
        raise Interrupted(
            f"{verdict}; rolled back to step {verdict.to_step}, without the data of steps {first} to {last}"
        )
