"""How far a run is, for a person who watches: a live line in a terminal, plain lines in a log file."""

import logging
from datetime import datetime, timedelta
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

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
        self._started, self._steps_before = monotonic(), first_step - 1
        self._live: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[tokens_per_second]:,.0f} tokens/s"),
                TextColumn("{task.fields[left]}"),
                console=console,
            )
            self._task = self._live.add_task(
                "train", total=num_steps, completed=first_step - 1, loss=float("nan"), tokens_per_second=0.0, left=""
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

    def update(self, step: int, loss: float, tokens_per_second: float) -> float:
        """Show that `step` (counted from 1) is done; return the seconds left.

        They are the rest of the run at the mean pace of this process, evaluation and saves included. Its first step
        is left out, which is slower, as soon as there is another.
        """
        now = monotonic()
        seconds_left = (now - self._started) / (step - self._steps_before) * (self.num_steps - step)
        if step == self.first_step:
            self._started, self._steps_before = now, step
        if self._live is not None:
            left = when(seconds_left)
            self._live.update(self._task, completed=step, loss=loss, tokens_per_second=tokens_per_second, left=left)
        elif step % self.plain_every == 0 or step == self.num_steps:
            logger.info(
                "step %d/%d  loss %.4f  %s tokens/s  %s",
                step,
                self.num_steps,
                loss,
                f"{tokens_per_second:,.0f}",
                when(seconds_left),
            )
        return seconds_left


def when(seconds_left: float) -> str:
    """Return what is left and when that is over, in local time: "1:02:03 left (14:05)"."""
    left = timedelta(seconds=round(seconds_left))
    end = datetime.now() + left
    form = "%H:%M" if left < timedelta(hours=12) else "%a %H:%M" if left < timedelta(days=6) else "%Y-%m-%d %H:%M"
    return f"{left} left ({end:{form}})"
