"""What a run's metrics.jsonl says, read while it may still be written to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RECENT_LINES: Final = 100
"""Lines at the end that are read one and all."""
SAMPLED_LINES: Final = 300
"""Lines that the curve of a long run is drawn from."""


@dataclass(frozen=True)
class MetricsFile:
    """Some of the lines: the newest, and those that a curve takes."""

    recent: Sequence[Mapping[str, Any]] = ()
    sampled: Sequence[Mapping[str, Any]] = ()
    """Evenly over the whole run."""
    heldout: Mapping[str, Any] | None = None
    """The newest line with held-out results."""
    problems: Sequence[str] = ()
    """Lines that cannot be read, by number."""
    modified: float | None = None
    """Time of the last change, seconds since 1970; None where there is no file."""

    @classmethod
    def read(cls, path: Path) -> "MetricsFile":
        """Read what is there. A last line without its end is being written, and is passed over."""
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
            modified = path.stat().st_mtime
        except FileNotFoundError:
            return cls()
        except OSError as error:
            return cls(problems=[f"{path} cannot be read: {error.strerror}"])
        reader = _Reader(path, lines)
        first_recent = max(0, len(lines) - RECENT_LINES)
        recent = reader.read(range(first_recent, len(lines)))
        sampled = reader.read(range(0, len(lines), max(1, len(lines) // SAMPLED_LINES)))
        last_heldout = next((n for n in reversed(range(len(lines))) if b'"heldout_' in lines[n]), None)
        heldout = reader.read(range(last_heldout, last_heldout + 1)) if last_heldout is not None else []
        return cls(recent, sampled, heldout[0] if heldout else None, list(reader.problems.values()), modified)


class _Reader:
    def __init__(self, path: Path, lines: Sequence[bytes]) -> None:
        self.path, self.lines = path, lines
        self.problems: dict[int, str] = {}

    def read(self, numbers: range) -> list[Mapping[str, Any]]:
        """Return the lines with these numbers, counted from 0, that are as they should be."""
        return [line for number in numbers if (line := self._parse(number)) is not None]

    def _parse(self, number: int) -> Mapping[str, Any] | None:
        try:
            line = json.loads(self.lines[number])
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("no step in it")
        except ValueError as error:
            self.problems[number] = f"{self.path}:{number + 1} is not a line of metrics ({error})"
            return None
        return line
