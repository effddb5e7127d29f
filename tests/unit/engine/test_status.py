"""How a run stands is told from its files, whatever is missing or broken among them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.config import save_config
from megatron_kosmos.engine.ending import write_ending
from megatron_kosmos.engine.status import NoRunError, RunStatus, read_status
from tests.distributed.tiny import tiny_run

WRITTEN = 1_000_000.0
"""When the metrics were, seconds since 1970."""


def line(step: int, **changes: Any) -> dict[str, Any]:
    values = {"loss": 10.0 / step, "seconds_total": 2.0, "seconds_left": 2.0 * (10 - step), "rank_slowest": 3}
    return {"step": step} | values | {"rank_seconds_worst": 1.1, "rank_seconds_median": 1.0} | changes


def write_run(folder: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    save_config(tiny_run(run_dir=str(folder), checkpoint__every=2), folder / "config.yaml")
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + tail)
    os.utime(path, (WRITTEN, WRITTEN))
    return folder


def add_checkpoint(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (WRITTEN - 5, WRITTEN - 5))


def read(folder: Path, later: float = 3.0) -> RunStatus:
    return read_status(folder, WRITTEN + later)


def test_a_run_that_goes_on_has_an_expected_end(tmp_path: Path) -> None:
    run = write_run(tmp_path, line(1), line(2, heldout_loss_text=4.0), line(3), line(4), tail='{"step": 5, "lo')
    add_checkpoint(run, 2)
    add_checkpoint(run, 4)
    status = read(run)
    assert (status.state, status.step, status.steps, status.warnings) == ("running", 4, 10, [])
    assert (status.seconds_left, status.expected_end) == (9.0, WRITTEN + 12.0)
    assert (status.heldout, status.heldout_step) == ({"loss_text": 4.0}, 2)
    assert (status.checkpoint_step, status.checkpoint_age_seconds) == (4, 8.0)
    assert status.losses == [10.0 / step for step in range(1, 5)]
    assert status.loss_change == pytest.approx((10 / 3 + 10 / 4) / 2 - (10 + 5) / 2)


@pytest.mark.parametrize("later, state", [(59.0, "running"), (61.0, "silent")])
def test_a_run_without_news_for_twenty_steps_is_silent(tmp_path: Path, later: float, state: str) -> None:
    status = read(write_run(tmp_path, line(1)), later)
    assert status.state == state
    assert (status.seconds_left is None) is (state == "silent")
    assert [warning.partition(":")[0] for warning in status.warnings] == [
        f"no metrics for {later:.0f} s, 30 times a step"
    ] * (state == "silent")


def test_a_line_every_few_steps_allows_as_many_times_the_silence(tmp_path: Path) -> None:
    lines = [line(step, seconds_total=1.0) for step in (10, 20, 30)]
    assert read(write_run(tmp_path, *lines), 199.0).state == "running"
    assert read(tmp_path, 201.0).state == "silent"


@pytest.mark.parametrize("ending", ["finished", "interrupted", "refused"])
def test_how_it_ended_is_told_however_long_ago(tmp_path: Path, ending: Any) -> None:
    run = write_run(tmp_path, line(1), line(2))
    write_ending(run, ending, "as it said\nitself")
    status = read(run, 1e6)
    assert (status.state, status.details, status.warnings) == (ending, "as it said\nitself", [])


def test_troubles_are_named(tmp_path: Path) -> None:
    lines = [line(step) for step in range(1, 8)]
    lines[5] |= {"loss": None, "nonfinite": ["loss", "grad_norm"]}
    lines[6] |= {"rank_seconds_worst": 1.8}
    run = write_run(tmp_path, *lines)
    add_checkpoint(run, 2)
    (run / "hang").mkdir()
    (run / "hang" / "summary.txt").write_text("rank 3")
    assert read(run).warnings == [
        f"the watchdog ended it: {run / 'hang' / 'summary.txt'}",
        "step 6: loss, grad_norm not finite (1 of 7 lines)",
        "rank 3 takes 1.8 times as long as the median rank",
        "the newest checkpoint is of step 2, though one is due every 2 steps",
    ]


def test_broken_files_are_named_and_the_rest_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, line(1))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("not json\n[1]\n" + json.dumps(line(2)) + "\n")
    (run / "config.yaml").write_text("run_dir: [")
    status = read(run)
    assert (status.step, status.steps, status.metrics["loss"]) == (2, None, 5.0)
    config, first, second = status.warnings
    assert config.startswith("the number of steps is not known: ")
    assert "config.yaml is not valid YAML" in config
    assert first.startswith(f"{run / 'metrics.jsonl'}:2 is not a line of metrics")
    assert second == f"{run / 'metrics.jsonl'}:3 is not a line of metrics (no step in it)"


def test_a_run_that_was_refused_at_once_has_only_its_word(tmp_path: Path) -> None:
    write_ending(tmp_path, "refused", "no tokenizer at x")
    status = read(tmp_path)
    assert (status.state, status.details, status.step, status.steps) == ("refused", "no tokenizer at x", 0, None)


def test_a_run_without_metrics_is_starting(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert read(tmp_path).state == "starting"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match="there is no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(NoRunError, match=r"it has none of metrics\.jsonl, config\.yaml"):
        read(tmp_path)


def test_the_curve_of_a_long_run_is_drawn_from_some_of_its_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path, *(line(step) for step in range(1, 2001)))
    losses = read(run).losses
    assert 300 <= len(losses) <= 400
    assert losses[0] == 10.0
    assert losses == sorted(losses, reverse=True)
