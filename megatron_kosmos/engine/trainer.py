"""The training loop. The trainer owns time; everything that is not an optimizer step is a callback's."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.interruption import Interrupted
from megatron_kosmos.engine.train_step import StepResult, StepRunner
from megatron_kosmos.observability.metrics import Scalar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """A finished step, as callbacks see it."""

    step: int
    """Optimizer steps done, this one included: the first step is 1."""
    is_last: bool
    result: StepResult
    seconds: float
    """Wall time of the step, waiting for its data included, callbacks not."""
    scalars: dict[str, Scalar] = field(default_factory=dict)
    """Further numbers for the metrics of this step; callbacks add to it."""

    def is_due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps (0: never) and at the end happens now."""
        return self.is_last or (every > 0 and self.step % every == 0)


class Callback:
    """Something that happens beside the training; called on every rank, in the order of the list."""

    def after_step(self, report: StepReport) -> None:
        """React to a finished step."""

    def on_interruption(self, step: int) -> None:
        """React to the end of the run after so many steps, before its last."""

    def close(self) -> None:
        """Put away what is open; called once, also after an error."""


class Trainer:
    """Runs the steps of a run from where it stands to its end."""

    def __init__(self, run: RunConfig, runner: StepRunner, callbacks: Sequence[Callback]) -> None:
        self.run, self.runner, self.callbacks = run, runner, callbacks

    def train(self, first_step: int, batches: Iterator[list[MultimodalBatch]]) -> None:
        """Take every step from `first_step` (steps done so far) to the last; `batches` begins with that step's.

        Raises Interrupted when `batches` does, once every callback has heard of it.
        """
        try:
            for step in range(first_step, self.run.training.steps):
                started = time.perf_counter()
                microbatches = self._next(batches, step)
                self._step(step, microbatches, started)
        finally:
            self.runner.heartbeat.enter("ending")
            for callback in self.callbacks:
                callback.close()

    def _next(self, batches: Iterator[list[MultimodalBatch]], step: int) -> list[MultimodalBatch]:
        try:
            return next(batches)
        except Interrupted as interrupted:
            logger.info("%s: stopping after step %d", interrupted, step)
            for callback in self.callbacks:
                callback.on_interruption(step)
            raise Interrupted(f"{interrupted}; stopped after step {step} of {self.run.training.steps}") from None

    def _step(self, step: int, microbatches: list[MultimodalBatch], started: float) -> None:
        result = self.runner.train(step, microbatches)
        seconds = time.perf_counter() - started
        self.runner.heartbeat.finish_step(step + 1)
        report = StepReport(step + 1, step + 1 == self.run.training.steps, result, seconds)
        for callback in self.callbacks:
            callback.after_step(report)
