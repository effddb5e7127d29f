"""A run at Weights & Biases, the same one after every resume."""

from collections.abc import Mapping
from secrets import token_hex
from typing import Final

import wandb

from megatron_kosmos.config import RunConfig, WandbConfig
from megatron_kosmos.observability.run_ids import read_run_id, write_run_id

CONNECT_SECONDS: Final = 60
FINISH_SECONDS: Final = 8
"""For what is pending at the end; less than the end of a run waits (`trackers.CLOSE_SECONDS`)."""


class WandbRun:
    """A tracker (`trackers.Tracker`). The library sends in a process of its own and lasts through outages.

    A step that is trained again after a crash is there already: Weights & Biases keeps the first.
    """

    def __init__(self, config: WandbConfig, run: RunConfig) -> None:
        """Connect, or make an offline folder in the run's."""
        run_id = read_run_id(run.run_dir, "wandb")
        if run_id is None:
            run_id = token_hex(8)
            write_run_id(run.run_dir, "wandb", run_id)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=run_id,
            name=run.run_dir.name,
            dir=run.run_dir,
            mode=config.mode,
            resume="allow",
            config=run.model_dump(mode="json"),
            allow_val_change=True,
            # The console and the code are the user's own: nothing goes out but settings and metrics.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                init_timeout=CONNECT_SECONDS,
                login_timeout=CONNECT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hand the metrics of a step to the library's process."""
        self._run.log(dict(scalars), step=step)

    def finish(self, is_complete: bool) -> None:
        """End the run; what is incomplete shows as failed, until it is resumed."""
        self._run.finish(exit_code=0 if is_complete else 1)
