"""The doctor's table, for a terminal or a job's log."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_kosmos.engine.doctor.checks import Check, Status, is_good

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
