"""What a run takes of disk and memory, from the plan that the dry run makes of it."""

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.doctor.judge_nodes import Needs
from megatron_kosmos.engine.dry_run import plan

_MASTER, _MOMENTS = 4, 8
"""Bytes of an element in a checkpoint: fp32 weights, and two moments of what is trained."""


def needs_of(run: RunConfig, world_size: int) -> Needs:
    """Return what `run` takes on `world_size` ranks. Raises ConfigError where they don't fit each other."""
    made = plan(run, world_size)
    checkpoint = sum(_MASTER * size.total + _MOMENTS * size.trained for size in made.parts.values())
    kept = run.checkpoint
    saves = -(-run.training.steps // kept.every) if kept.every else 1
    for_good = run.training.steps // kept.keep_every if kept.keep_every else 0
    return Needs(
        # One more than is kept, while it is being written.
        disk=min(saves, kept.keep_last + 1) * checkpoint,
        disk_at_end=min(saves, kept.keep_last + 1 + for_good) * checkpoint,
        gpu=max(stage.memory.total for stage in made.stages),
        host=max(stage.snapshot for stage in made.stages) if run.checkpoint.asynchronous else 0,
    )
