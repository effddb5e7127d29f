"""The memory of the rank that holds most: it decides whether the run fits."""

import torch
import torch.distributed as dist

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.trainer import Callback, StepReport
from megatron_kosmos.observability.memory import peak_memory


class MemoryReport(Callback):
    """Puts the largest of the ranks' peaks (`observability.memory`), in bytes, into the metrics."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.every, self.device = run.logging.metrics_every, device

    def after_step(self, report: StepReport) -> None:
        """Where metrics are due, take the largest (all-reduce of at most three numbers over all ranks)."""
        if not report.is_due(self.every):
            return
        peaks = peak_memory(self.device)
        largest = torch.tensor(list(peaks.values()), device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            report.scalars.update(zip(peaks, largest.tolist(), strict=True))
