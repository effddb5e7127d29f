"""How a run stands, from the files in its folder alone: on any machine that sees them, without torch."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from megatron_kosmos.checkpoint.folders import CHECKPOINTS, complete_folder, finished_steps
from megatron_kosmos.config import ConfigError, RunConfig, load_config
from megatron_kosmos.engine.ending import ending_path, read_ending
from megatron_kosmos.engine.metrics_file import MetricsFile

SILENT_STEPS: Final = 20
"""Times of a step without metrics after which a run is thought to stand still."""
SILENT_SECONDS: Final = 60.0
"""Without metrics for less than this, none is."""
SLOW_RANK: Final = 1.5
"""Times of the median that the slowest rank may take."""

State = Literal["starting", "running", "silent", "finished", "interrupted", "refused"]
"""silent: it has not said that it ended, but there are no new metrics."""


class NoRunError(ValueError):
    """A folder that is no run's; the message names it."""


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run. None stands for what is not, or not yet."""

    run_dir: str
    state: State
    details: str = ""
    """What the run said of its end."""
    step: int = 0
    steps: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The newest line of metrics.jsonl."""
    losses: Sequence[float] = ()
    """Over the whole run, some hundred points."""
    loss_change: float | None = None
    """From the first half of the recent lines to the second: mean to mean."""
    heldout: Mapping[str, float] = field(default_factory=dict)
    heldout_step: int | None = None
    metrics_age_seconds: float | None = None
    seconds_left: float | None = None
    expected_end: float | None = None
    """Seconds since 1970."""
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    warnings: Sequence[str] = ()


def read_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """Return how the run in `run_dir` stands at the time `now` (seconds since 1970; this moment).

    Raises NoRunError where there is no run. What is missing or broken in one becomes a warning.
    """
    now = time.time() if now is None else now
    parts = ("metrics.jsonl", "config.yaml", "logs", "ended", CHECKPOINTS)
    if not run_dir.is_dir():
        raise NoRunError(f"no run at {run_dir}: there is no such folder")
    if not any((run_dir / part).exists() for part in parts):
        raise NoRunError(f"no run at {run_dir}: it has none of {', '.join(parts)}")
    warnings: list[str] = []
    config = _read_config(run_dir / "config.yaml", warnings)
    metrics = MetricsFile.read(run_dir / "metrics.jsonl")
    warnings += metrics.problems
    newest = metrics.recent[-1] if metrics.recent else {}
    age = None if metrics.modified is None else max(0.0, now - metrics.modified)
    checkpoint_step, checkpoint_age = _newest_checkpoint(run_dir, now)
    state = _state(run_dir, metrics, age)
    left = _number(newest, "seconds_left") if state == "running" else None
    left = None if left is None else max(0.0, left - (age or 0.0))
    status = RunStatus(
        run_dir=str(run_dir),
        state=state,
        details=_details(run_dir),
        step=newest.get("step", 0),
        steps=None if config is None else config.training.steps,
        metrics=newest,
        losses=[loss for line in metrics.sampled if (loss := _number(line, "loss")) is not None],
        loss_change=_loss_change(metrics.recent),
        heldout=_heldout(metrics.heldout),
        heldout_step=None if metrics.heldout is None else metrics.heldout["step"],
        metrics_age_seconds=age,
        seconds_left=left,
        expected_end=None if left is None else now + left,
        checkpoint_step=checkpoint_step,
        checkpoint_age_seconds=checkpoint_age,
        warnings=warnings,
    )
    warnings += _troubles(status, metrics.recent, config, run_dir)
    return status


def _read_config(path: Path, warnings: list[str]) -> RunConfig | None:
    if not path.exists():
        return None
    try:
        return load_config(path)
    except ConfigError as error:
        warnings.append(f"the number of steps is not known: {error}")
        return None


def _state(run_dir: Path, metrics: MetricsFile, age: float | None) -> State:
    ending = read_ending(run_dir)
    if ending is not None:
        return ending
    if age is None or not metrics.recent:
        return "starting"
    # The longest of the last ones: one in which it evaluated or saved may have been many times as long.
    pace = max((_number(line, "seconds_total") or 0.0) for line in metrics.recent) * _steps_a_line(metrics.recent)
    return "silent" if age > max(SILENT_SECONDS, SILENT_STEPS * pace) else "running"


def _steps_a_line(lines: Sequence[Mapping[str, Any]]) -> float:
    return (lines[-1]["step"] - lines[0]["step"]) / (len(lines) - 1) if len(lines) > 1 else 1.0


def _details(run_dir: Path) -> str:
    try:
        return ending_path(run_dir).read_text(encoding="utf-8", errors="replace").partition("\n")[2].strip()
    except OSError:
        return ""


def _newest_checkpoint(run_dir: Path, now: float) -> tuple[int | None, float | None]:
    try:
        steps = finished_steps(run_dir / CHECKPOINTS)
        if not steps:
            return None, None
        return steps[0], max(0.0, now - complete_folder(run_dir / CHECKPOINTS, steps[0]).stat().st_mtime)
    except OSError:
        return None, None  # it was removed meanwhile; the next look finds another


def _loss_change(lines: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [loss for line in lines if (loss := _number(line, "loss")) is not None]
    half = len(losses) // 2
    return sum(losses[-half:]) / half - sum(losses[:half]) / half if half else None


def _heldout(line: Mapping[str, Any] | None) -> dict[str, float]:
    names = [name for name in line or {} if name.startswith("heldout_")]
    return {name.removeprefix("heldout_"): value for name in names if (value := _number(line or {}, name)) is not None}


def _troubles(
    status: RunStatus, lines: Sequence[Mapping[str, Any]], config: RunConfig | None, run_dir: Path
) -> Iterator[str]:
    """Yield what a person should look at."""
    if status.state == "silent" and status.metrics_age_seconds is not None:
        times = status.metrics_age_seconds / max(1e-9, _number(status.metrics, "seconds_total") or 1e-9)
        yield (
            f"no metrics for {status.metrics_age_seconds:.0f} s, {times:,.0f} times a step: it hangs or was killed; "
            f"see {run_dir / 'logs'} and {run_dir / 'hang'}"
        )
    hang = run_dir / "hang" / "summary.txt"
    if status.state != "finished" and hang.exists():
        newest = run_dir / "metrics.jsonl"
        if not newest.exists() or hang.stat().st_mtime >= newest.stat().st_mtime:
            yield f"the watchdog ended it: {hang}"
    if bad := [line for line in lines if line.get("nonfinite")]:
        yield f"step {bad[-1]['step']}: {', '.join(bad[-1]['nonfinite'])} not finite ({len(bad)} of {len(lines)} lines)"
    worst, median = (_number(status.metrics, f"rank_seconds_{name}") for name in ("worst", "median"))
    if worst and median and worst > SLOW_RANK * median:
        yield f"rank {status.metrics.get('rank_slowest')} takes {worst / median:.1f} times as long as the median rank"
    if config is not None and (every := config.checkpoint.every):
        saved = status.checkpoint_step or 0
        if status.step - saved > 2 * every:
            yield f"the newest checkpoint is of step {saved}, though one is due every {every} steps"


def _number(line: Mapping[str, Any], name: str) -> float | None:
    value = line.get(name)
    return value if isinstance(value, int | float) else None
