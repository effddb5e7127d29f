"""What a run takes, against its plan."""

from pathlib import Path

from megatron_kosmos.config import load_config
from megatron_kosmos.engine.doctor.needs import needs_of
from megatron_kosmos.engine.dry_run import plan

TINY = Path(__file__).parents[4] / "configs" / "kosmos_tiny.yaml"


def test_disk_and_memory_follow_the_plan() -> None:
    settings = ("training.steps=100", "checkpoint.every=10", "checkpoint.keep_last=2", "checkpoint.keep_every=0")
    run = load_config(TINY, settings)
    needs, made = needs_of(run, 2), plan(run, 2)
    fp32 = sum(4 * size.total + 8 * size.trained for size in made.parts.values())
    # Two are kept while the third is written.
    assert needs.disk == 3 * fp32
    assert needs.gpu == max(stage.memory.total for stage in made.stages) > 0
    assert needs.host == max(stage.snapshot for stage in made.stages) > 0
    kept = load_config(TINY, (*settings[:3], "checkpoint.keep_every=25", "checkpoint.asynchronous=false"))
    assert (needs_of(kept, 2).disk, needs_of(kept, 2).disk_at_end) == (3 * fp32, 7 * fp32)
    assert needs_of(kept, 2).host == 0
    short = load_config(TINY, ("checkpoint.keep_last=2", "checkpoint.every=0"))
    assert needs_of(short, 2).disk == needs_of(short, 2).disk_at_end == fp32  # it makes no more than one
