"""One node under examination: where it stands, what is wanted of it, and what it has to work with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.doctor.checks import Check
from megatron_kosmos.engine.doctor.facts import NodeFacts, SumFacts, Wire
from megatron_kosmos.engine.doctor.judge_nodes import Needs
from megatron_kosmos.engine.doctor.meeting import Meeting, Place
from megatron_kosmos.engine.doctor.shared_folder import SharedFolder
from megatron_kosmos.engine.doctor.workers import Workers

NODE, SUMS = Wire(NodeFacts), Wire(tuple[SumFacts, ...])
"""How nodes tell each other what they found."""


@dataclass(frozen=True)
class Wanted:
    """What a job is to be examined for."""

    num_workers: int
    """Processes a node, each with a GPU unless `on_cpu`."""
    on_cpu: bool
    run_dir: Path
    timeout_seconds: float
    run: RunConfig | None = None
    refusal: str = ""
    """Why the settings can't be read, where they can't."""
    plan_needs: Callable[[RunConfig, int], Needs] | None = None
    """What the run takes; called on the first node only, since it loads the whole stack."""


@dataclass(frozen=True)
class Patient:
    """A node that has met the others and looked at itself."""

    place: Place
    wanted: Wanted
    meeting: Meeting
    workers: Workers
    folder: SharedFolder
    facts: NodeFacts

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.place.num_nodes * self.wanted.num_workers


@dataclass(frozen=True)
class Findings:
    """What a node has to say at the end."""

    is_good: bool
    """Whether the job may start; the same on every node that reached the first one."""
    checks: tuple[Check, ...]
    """To be printed: all on the first node, on another only what it couldn't tell the first."""
