"""Signals that ask a run to stop: noted by the process that gets one, heeded by all ranks at the end of the same step.

SIGUSR1 comes from job scripts before a time limit, SIGTERM from torchrun's agent, from SLURM at preemption and from
people, SIGINT from a terminal. A second SIGINT ends the process at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOPPING: Final = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """One rank was asked to stop; raised on all ranks alike, between two steps."""


class Interruption:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that asked for it."""

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Note the signals that come inside the block instead of dying of them. For the main thread."""
        before = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Runs between any two instructions of the main thread: so it only notes, and takes no lock.
        if self.received is None:
            self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
