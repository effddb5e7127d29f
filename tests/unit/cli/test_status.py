"""`kosmos status`: what a terminal shows of runs, and what a script reads."""

import json
from pathlib import Path

import pytest

from megatron_kosmos.cli.main import build_app
from megatron_kosmos.cli.status import sparkline
from megatron_kosmos.engine.ending import write_ending


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    line = {"loss": 2.5, "loss_text": 4.0, "mfu": 0.41, "tokens_per_second": 44400.0, "share_data": 0.25}
    lines = [json.dumps({"step": step} | line | {"loss": 10.0 / step}) for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_ending(folder, "interrupted", "SIGTERM [bold]")
    return folder


def status(*arguments: object) -> None:
    build_app()(["status", *map(str, arguments)], standalone_mode=False)


def test_one_run_is_told_line_by_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(run_dir)
    shown = capsys.readouterr().out
    for part in ("interrupted: SIGTERM [bold]", "8 of ?", "1.2500  █", "text 4.0000", "44,400 tokens/s", "MFU 41.0%"):
        assert part in shown
    assert "data 25%" in shown


def test_several_runs_are_a_table(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    refused = tmp_path / "refused"
    write_ending(refused, "refused", "no tokenizer")
    status(run_dir, refused)
    shown = capsys.readouterr().out
    assert "interrupted" in shown
    assert "refused" in shown


def test_scripts_read_an_object_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(run_dir, run_dir, "--json")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["state"] == second["state"] == "interrupted"
    assert (first["step"], first["metrics"]["loss"], first["expected_end"]) == (8, 1.25, None)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"kosmos status: no run at .*/nowhere: there is no such folder"):
        status(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "values, curve",
    [([], ""), ([2.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0.0, 2.0, 6.0, 8.0], "▁█")],
)
def test_a_curve_goes_from_the_lowest_to_the_highest(values: list[float], curve: str) -> None:
    assert sparkline(values, 2) == curve
