"""What watches over a run from outside of its loop: the signals that stop it, and the watchdog."""

from dataclasses import dataclass, field
from typing import Final, Self

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.interruption import Interruption
from megatron_kosmos.observability.heartbeat import PATIENCE, Heartbeat
from megatron_kosmos.observability.watchdog import Watchdog

SHORTEST_TIMEOUT: Final = 600
"""Seconds that a collective waits for a rank, where the watchdog allows less or is off."""


@dataclass(frozen=True)
class Supervision:
    """What watches over one rank."""

    interruption: Interruption = field(default_factory=Interruption)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    watchdog: Watchdog | None = None
    """Watches the `heartbeat`."""

    @property
    def collective_seconds(self) -> int:
        """How long a collective waits for a rank: longer than the watchdog does, which knows more to say."""
        seconds = 0.0 if self.watchdog is None else self.watchdog.seconds
        return max(SHORTEST_TIMEOUT, round(2 * PATIENCE * seconds))

    @classmethod
    def of_rank(cls, run: RunConfig, rank: int, interruption: Interruption) -> Self:
        """Start the watchdog of a rank, which lasts until the process ends."""
        heartbeat = Heartbeat()
        watchdog = Watchdog(run.run_dir, rank, run.health.watchdog_seconds, heartbeat)
        watchdog.start()
        return cls(interruption, heartbeat, watchdog)
