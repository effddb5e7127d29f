"""A check: what was looked at, how it stands, what was found, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


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
