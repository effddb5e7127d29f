"""Reads input files in a process of its own with bounded memory and time, so that a hang or a crash fails a test.

`read_limited` starts it; `python -m tests.unit.data.sources.limited_reading MEGABYTES KIND FILE…` is what it starts.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmos.data.errors import BadDocument
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, read_records
from megatron_kosmos.prompt import SourceKind

ROOT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Outcome:
    """What became of the records of the files."""

    good: list[list[str]]
    """The parts of each document that can be used: texts, and contents of pictures."""
    bad: list[tuple[str, str, str]]
    """Origin, reason and detail of each of the others."""
    opened: list[str]
    """Files that were opened, none of them Python's own."""
    megabytes: float
    """Memory that reading took at most, beyond what the process had before."""


def read_limited(kind: SourceKind, *files: Path, megabytes: int = 400, seconds: int = 300) -> Outcome:
    """Read `files` with at most so much address space more than the imports take, and in at most so much time."""
    command = [sys.executable, "-m", __name__, str(megabytes), kind, *map(str, files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    return Outcome(**told | {"bad": [tuple(problem) for problem in told["bad"]]})


def limit_memory(megabytes: int) -> None:
    """Let this process have at most so much address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _read(kind: SourceKind, file: Path, good: list[list[str]], bad: list[tuple[str, str, str]]) -> None:
    for record in read_records(kind, file):
        try:
            document = parse_record(kind, record)
        except BadDocument as problem:
            bad.append((problem.origin, problem.reason, problem.detail))
        else:
            parts = [part.read() if isinstance(part, ImageReference) else part for part in document.parts]
            good.append([part.decode("latin-1") if isinstance(part, bytes) else part for part in parts])


def _main(megabytes: int, kind: SourceKind, *files: Path) -> None:
    import pyarrow  # noqa: F401 - not to be counted

    good: list[list[str]] = []
    bad: list[tuple[str, str, str]] = []
    opened: list[str] = []
    before = _peak_megabytes()
    limit_memory(megabytes)
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    for file in files:
        _read(kind, file, good, bad)
    paths = [path for path in opened if not path.startswith((sys.prefix, sys.base_prefix, "/usr/lib", "/proc"))]
    json.dump({"good": good, "bad": bad, "opened": paths, "megabytes": _peak_megabytes() - before}, sys.stdout)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))  # type: ignore[arg-type]
