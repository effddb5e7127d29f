"""How far a run is, for a person who watches: a live line in a terminal, plain lines in a log file."""

import logging
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class ProgressLine:
    """Step, loss, throughput and time left of a training run, on rank 0.

    In a terminal it is one line that redraws itself below the log messages of the same `console`; elsewhere, a log
    message every `plain_every` steps and at the last one.
    """

    def __init__(self, num_steps: int, first_step: int, console: Console, plain_every: int = 10) -> None:
        """`first_step`: the first step that this process runs, counted from 1; later than 1 when it resumes."""
        self.num_steps = num_steps
        self.first_step = first_step
        self.plain_every = plain_every
        self._started = monotonic()
        self._live: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[tokens_per_second]:,.0f} tokens/s"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._task = self._live.add_task(
                "train", total=num_steps, completed=first_step - 1, loss=float("nan"), tokens_per_second=0.0
            )

    def __enter__(self) -> Self:
        self._started = monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` (counted from 1) is done."""
        if self._live is not None:
            self._live.update(self._task, completed=step, loss=loss, tokens_per_second=tokens_per_second)
        elif step % self.plain_every == 0 or step == self.num_steps:
            logger.info(
                "step %d/%d  loss %.4f  %s tokens/s  %s left",
                step,
                self.num_steps,
                loss,
                f"{tokens_per_second:,.0f}",
                self._time_left(step),
            )

    def _time_left(self, step: int) -> timedelta:
        """Return the rest of the run at the mean pace of this process, in whole seconds."""
        seconds_per_step = (monotonic() - self._started) / (step - self.first_step + 1)
        return timedelta(seconds=round(seconds_per_step * (self.num_steps - step)))
