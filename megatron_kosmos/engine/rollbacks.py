"""The roll-backs of a run: run_dir/rollbacks.json, which adds to `data.skip_steps` whenever the run starts.

A checkpoint is never changed, so what a run learns after its newest one needs a place of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.config import RunConfig
from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.config.data import join_stretches


class Rollback(StrictModel):
    """A spike of the loss, and what was decided."""

    step: PositiveInt
    loss: float
    bound: float
    """The loss above which it was a spike."""
    to_step: NonNegativeInt
    """The checkpoint that was newest."""
    skip_steps: tuple[PositiveInt, PositiveInt]
    """First and last step whose data are passed over from there on, as in `data.skip_steps`."""

    def __str__(self) -> str:
        return f"the loss of step {self.step}, {self.loss:.4g}, is a spike: above {self.bound:.4g}"


_FILE = TypeAdapter(tuple[Rollback, ...])


def rollbacks_path(run_dir: Path) -> Path:
    """Return the file of a run's roll-backs."""
    return run_dir / "rollbacks.json"


def read_rollbacks(run_dir: Path) -> tuple[Rollback, ...]:
    """Return the roll-backs of a run, the first one first. Raises OSError, and ValueError for a damaged file."""
    path = rollbacks_path(run_dir)
    if not path.exists():
        return ()
    try:
        return _FILE.validate_json(path.read_bytes(), strict=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged; put its stretches into data.skip_steps and remove it: {error}") from error


def write_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """Write the roll-backs of a run; the file is whole, or as before. Raises OSError."""
    path = rollbacks_path(run_dir)
    unfinished = path.with_name(".rollbacks.json.writing")
    lines = [json.dumps(rollback.model_dump(mode="json")) for rollback in rollbacks]
    unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    unfinished.replace(path)


def without_spikes(run: RunConfig, mesh: CheckpointMesh) -> RunConfig:
    """Return the run with the data of its roll-backs passed over, as rank 0 reads them (a collective over all ranks).

    Raises CheckpointError on every rank alike if it cannot.
    """
    doing = f"reading {rollbacks_path(run.run_dir)}"
    (rollbacks, *_) = mesh.agree(doing, lambda: read_rollbacks(run.run_dir) if mesh.rank == 0 else ())
    if not rollbacks:
        return run
    stretches = join_stretches([*run.data.skip_steps, *(rollback.skip_steps for rollback in rollbacks)])
    return run.model_copy(update={"data": run.data.model_copy(update={"skip_steps": stretches})})
