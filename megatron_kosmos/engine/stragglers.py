"""Which rank computes slowest: what all others wait for in every step."""

from statistics import median

import torch
import torch.distributed as dist

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.trainer import Callback, StepReport


class StragglerReport(Callback):
    """Puts the ranks' own seconds of computing a step, means since the last report, into the metrics.

    `rank_seconds_worst` and `rank_seconds_median` over all ranks, and `rank_slowest`, which the worst is of.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.every, self.device = run.logging.metrics_every, device
        self.seconds, self.num_steps = 0.0, 0

    def after_step(self, report: StepReport) -> None:
        """Add up; where metrics are due, gather one number of each rank (an all-gather over all ranks)."""
        self.seconds += report.result.compute_seconds
        self.num_steps += 1
        if not report.is_due(self.every):
            return
        mean = torch.tensor([self.seconds / self.num_steps], device=self.device)
        gathered = [torch.empty_like(mean) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mean)
        if dist.get_rank() == 0:
            seconds = torch.cat(gathered).tolist()
            worst = max(seconds)
            report.scalars["rank_seconds_worst"] = worst
            report.scalars["rank_seconds_median"] = median(seconds)
            report.scalars["rank_slowest"] = seconds.index(worst)
        self.seconds, self.num_steps = 0.0, 0
