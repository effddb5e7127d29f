"""Data may be skipped from a checkpoint on, not behind its back."""

from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.resumption import check_skipped_steps
from tests.distributed.tiny import tiny_run

Stretches = tuple[tuple[int, int], ...]


def check(step: int, saved: Stretches | None, now: Stretches) -> None:
    run: RunConfig = tiny_run()
    data: dict[str, Any] = {} if saved is None else {"skip_steps": [list(stretch) for stretch in saved]}
    changed = run.model_copy(update={"data": run.data.model_copy(update={"skip_steps": now})})
    check_skipped_steps(Path("step_00000010"), {"step": step, "config": {"data": data}}, changed)


@pytest.mark.parametrize(
    "step, saved, now",
    [
        (10, (), ((11, 20),)),  # the checkpoint is before the stretch that went wrong
        (10, None, ((11, 20),)),  # a checkpoint from before there was the setting
        (10, ((3, 4),), ((3, 4), (13, 20))),  # ten steps took the data of twelve
        (10, ((3, 4), (13, 20)), ((3, 4),)),
        (10, ((3, 4), (13, 20)), ((3, 4), (14, 15))),
    ],
)
def test_what_lies_behind_the_checkpoint_may_change(step: int, saved: Stretches | None, now: Stretches) -> None:
    check(step, saved, now)


@pytest.mark.parametrize(
    "step, saved, now",
    [(10, (), ((10, 20),)), (10, ((3, 4),), ()), (10, ((3, 4),), ((3, 5),)), (10, ((3, 4),), ((3, 4), (12, 12)))],
)
def test_what_the_run_took_may_not(step: int, saved: Stretches, now: Stretches) -> None:
    with pytest.raises(CheckpointError, match=r"step_00000010 was trained with data\.skip_steps=.* before its step 10"):
        check(step, saved, now)
