"""What the ranks of a run that hangs tell each other, and whom that makes suspect."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

MOST_NAMED = 8
"""Ranks that a message names one by one."""


@dataclass(frozen=True)
class RankReport:
    """Where a rank is or was: the first line of its file."""

    start_number: int
    """Which start of the run it belongs to."""
    rank: int
    host: str
    pid: int
    steps: int
    phase: str
    mark: int
    """See `Place`."""
    idle_seconds: float
    """How long it has been there when it gave up; 0 before."""

    def to_line(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return what the first line of a file says; None where there is none, or it is not whole."""
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                return cls(**json.loads(file.readline()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}) in step {self.steps + 1}, {self.phase}"


def verdict(reports: Mapping[int, RankReport], beats: Mapping[int, RankReport | None]) -> str:
    """Say which ranks are suspect, given the `reports` after the alarm and the last words of all ranks before it.

    Ranks that did not answer are; else those that are behind the others.
    """
    silent = [rank for rank in beats if rank not in reports]
    steps = max(report.steps for report in reports.values())
    idle = max(report.idle_seconds for report in reports.values())
    head = f"no progress for {idle:.0f} s after step {steps}"
    if silent:
        heard = [f"{beats[rank] or f'rank {rank} (never heard of)'}" for rank in silent]
        return f"{head}; suspect is what does not answer, being stopped, dead or cut off:\n{_listed(heard)}"
    behind = min(report.mark for report in reports.values())
    suspects = [str(report) for _, report in sorted(reports.items()) if report.mark == behind]
    if len(suspects) == len(reports):
        return (
            f"{head}; all {len(reports)} ranks answer, and are at the same place: {reports[0].phase}; see their stacks"
        )
    others = sorted({f"step {each.steps + 1}, {each.phase}" for each in reports.values() if each.mark != behind})
    return f"{head}; suspect is what is behind the others (they are in {' or '.join(others)}):\n{_listed(suspects)}"


def _listed(lines: Collection[str]) -> str:
    shown = [f"  {line}" for line in list(lines)[:MOST_NAMED]]
    more = len(lines) - len(shown)
    return "\n".join([*shown, *([f"  and {more} more"] if more else [])])
