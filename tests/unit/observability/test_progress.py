"""A terminal gets one live line; a file gets a line every few steps and the last."""

import io
import re

import pytest
from rich.console import Console

from megatron_kosmos.observability.progress import ProgressLine, when


def test_a_terminal_sees_step_loss_throughput_and_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with ProgressLine(num_steps=40, first_step=1, console=console) as progress:
        for step in range(1, 31):
            progress.update(step, loss=2.25, tokens_per_second=12345.6)
    assert isinstance(console.file, io.StringIO)
    assert re.search(
        r"step 30/40 .* loss 2\.2500 12,346 tokens/s \d+:\d\d:\d\d left \(\d\d:\d\d\)", console.file.getvalue()
    )


def test_elsewhere_a_line_is_logged_every_few_steps_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), width=120)
    with (
        caplog.at_level("INFO", "megatron_kosmos"),
        ProgressLine(num_steps=12, first_step=3, console=console, plain_every=5) as progress,
    ):
        for step in range(3, 13):
            left = progress.update(step, loss=1.5, tokens_per_second=1000.0)
    steps = [
        re.match(r"step (\d+)/12  loss 1\.5000  1,000 tokens/s  \d+:\d\d:\d\d left \(\d\d:\d\d\)$", line)
        for line in caplog.messages
    ]
    assert [match and int(match[1]) for match in steps] == [5, 10, 12]
    assert left == 0.0
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    "seconds, text",
    [
        (3723.4, r"1:02:03 left \(\d\d:\d\d\)"),
        (86_400.0, r"1 day, 0:00:00 left \(\w+ \d\d:\d\d\)"),
        (864_000.0, r"10 days, 0:00:00 left \(\d{4}-\d\d-\d\d \d\d:\d\d\)"),
    ],
)
def test_the_expected_end_names_a_day_that_is_not_today(seconds: float, text: str) -> None:
    assert re.fullmatch(text, when(seconds))
