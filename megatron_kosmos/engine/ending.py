"""How a run ended, in one word, for the script that started it: the first line of the file `ended` in its folder.

The file is absent while a run goes on, and after a crash, a hang or the loss of a machine: running again may help then.
"""

import os
from pathlib import Path
from typing import Literal, get_args

from megatron_kosmos.checkpoint.folders import CHECKPOINTS, finished_steps
from megatron_kosmos.config import RunConfig

Ending = Literal["finished", "interrupted", "refused"]
"""All steps are done; a signal stopped it and a checkpoint of that step is whole, where there was a step to save; or it
cannot run as it is, and would end the same way again."""


def ending_path(run_dir: Path) -> Path:
    """Return the file that says how the run ended."""
    return run_dir / "ended"


def write_ending(run_dir: Path, ending: Ending, details: str) -> None:
    """Say how the run ended: the word, then `details` for people. The file is whole or absent. Raises OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = ending_path(run_dir)
    unfinished = path.with_name(f".ended.{os.uname().nodename}.{os.getpid()}")
    unfinished.write_text(f"{ending}\n{details}\n", encoding="utf-8", errors="backslashreplace")
    unfinished.replace(path)


def read_ending(run_dir: Path) -> Ending | None:
    """Return how the run ended; None where it did not say."""
    try:
        word, *_ = ending_path(run_dir).read_text(encoding="utf-8").split("\n")
    except OSError:
        return None
    return next((ending for ending in get_args(Ending) if ending == word), None)


def forget_ending(run_dir: Path) -> None:
    """Remove the word of an earlier start. Raises OSError."""
    ending_path(run_dir).unlink(missing_ok=True)


def is_finished(run: RunConfig) -> bool:
    """Whether an earlier start took all the steps that `run` wants, said or not; looks at names only, in no time."""
    steps = finished_steps(run.run_dir / CHECKPOINTS)
    return bool(steps) and steps[0] >= run.training.steps
