"""A terminal gets one live line; a file gets a line every few steps and the last."""

import io
import re

import pytest
from rich.console import Console

from megatron_kosmos.observability.progress import ProgressLine


def test_a_terminal_sees_step_loss_throughput_and_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with ProgressLine(num_steps=40, first_step=1, console=console) as progress:
        for step in range(1, 31):
            progress.update(step, loss=2.25, tokens_per_second=12345.6)
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"step 30/40 .* loss 2\.2500 12,346 tokens/s \d+:\d\d:\d\d", console.file.getvalue())


def test_elsewhere_a_line_is_logged_every_few_steps_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), width=120)
    with (
        caplog.at_level("INFO", "megatron_kosmos"),
        ProgressLine(num_steps=12, first_step=3, console=console, plain_every=5) as progress,
    ):
        for step in range(3, 13):
            progress.update(step, loss=1.5, tokens_per_second=1000.0)
    steps = [
        re.match(r"step (\d+)/12  loss 1\.5000  1,000 tokens/s  \d+:\d\d:\d\d left$", line) for line in caplog.messages
    ]
    assert [match and int(match[1]) for match in steps] == [5, 10, 12]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
