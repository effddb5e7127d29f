"""A check: what was looked at, how it stands, what was found, and what to do about it; and the table of all checks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_MOST_NAMES = 8


class Status(IntEnum):
    """From good to bad. Only what is bad keeps a job from starting."""

    GOOD = 0
    WARN = 1
    BAD = 2


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    subject: str
    status: Status
    found: str
    """With the names of the nodes, where not all are alike."""
    remedy: str = ""


def is_good(checks: Iterable[Check]) -> bool:
    """Whether nothing is bad."""
    return all(check.status < Status.BAD for check in checks)


def first_of(names: Iterable[str], separator: str = ", ") -> str:
    """Return names for a line of the table: the first of them, and how many more there are."""
    every = list(names)
    more = [f"and {len(every) - _MOST_NAMES} more"] if len(every) > _MOST_NAMES else []
    return separator.join([*every[:_MOST_NAMES], *more])


_WORDS = {Status.GOOD: Text("ok", "green"), Status.WARN: Text("warn", "yellow"), Status.BAD: Text("BAD", "bold red")}


def render(checks: Sequence[Check], title: str, console: Console) -> None:
    """Print one row for each check, and a last line that says how it stands."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for header in ("check", "", "found", "what to do"):
        table.add_column(header, overflow="fold")
    for check in checks:
        table.add_row(check.subject, _WORDS[check.status], Text(check.found), Text(check.remedy))
    console.print(table)
    num_bad = sum(check.status == Status.BAD for check in checks)
    num_warn = sum(check.status == Status.WARN for check in checks)
    last = "fit to train" if is_good(checks) else "not fit to train"
    console.print(Text(f"kosmos doctor: {last}, {num_bad} bad, {num_warn} to look at", "" if num_bad == 0 else "red"))
