"""What this rank is doing, as its main thread says it in passing: for a thread that watches whether it goes on."""

from typing import Final, NamedTuple

PATIENCE: Final = 4
"""How many times as long as usual something slow may take."""
SLOW: Final = ("evaluate", "save", "ending")
"""Phases that wait for disks, or have no fixed size. What comes before the end of the first step is slow too."""


class Place(NamedTuple):
    """Where a rank is."""

    steps: int
    """Optimizer steps done."""
    phase: str
    """A section of `Timers`, or a part of the start."""
    mark: int
    """Counts what was said so far. All ranks go the same way, so the lower of two is behind."""
    is_slow: bool
    """Whether it may take `PATIENCE` times as long as usual."""


class Heartbeat:
    """Keeps the newest place. To tell it one is an assignment; the place is replaced as a whole, for other threads."""

    def __init__(self) -> None:
        self.place = Place(0, "starting", 0, True)
        self._is_starting = True

    def enter(self, phase: str) -> None:
        """Say that something else begins."""
        self._tell(self.place.steps, phase)

    def advance(self) -> None:
        """Say that what is under way goes on."""
        self._tell(self.place.steps, self.place.phase)

    def finish_step(self, steps: int) -> None:
        """Say that so many steps are done."""
        self._is_starting = False
        self._tell(steps, self.place.phase)

    def _tell(self, steps: int, phase: str) -> None:
        self.place = Place(steps, phase, self.place.mark + 1, self._is_starting or phase in SLOW)
