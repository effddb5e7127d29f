"""The training loop. The trainer owns time; everything that is not an optimizer step is a callback's."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.train_step import StepResult, StepRunner
from megatron_kosmos.observability.metrics import Scalar


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


class Callback(Protocol):
    """Something that happens beside the training; called on every rank, in the order of the list."""

    def after_step(self, report: StepReport) -> None:
        """React to a finished step."""

    def close(self) -> None:
        """Put away what is open; called once, also after an error."""


class Trainer:
    """Runs the steps of a run from where it stands to its end."""

    def __init__(self, run: RunConfig, runner: StepRunner, callbacks: Sequence[Callback]) -> None:
        self.run, self.runner, self.callbacks = run, runner, callbacks

    def train(self, first_step: int, batches: Iterator[list[MultimodalBatch]]) -> None:
        """Take every step from `first_step` (steps done so far) to the last; `batches` begins with that step's."""
        num_steps = self.run.training.steps
        try:
            for step in range(first_step, num_steps):
                started = time.perf_counter()
                with self.runner.timers.section("data"):
                    microbatches = next(batches)
                result = self.runner.train(step, microbatches)
                report = StepReport(step + 1, step + 1 == num_steps, result, time.perf_counter() - started)
                for callback in self.callbacks:
                    callback.after_step(report)
        finally:
            for callback in self.callbacks:
                callback.close()
