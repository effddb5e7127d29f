"""What happens beside the training: evaluation, checkpoints, metrics and profiles."""

import logging
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.filesize import decimal
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from megatron_kosmos.checkpoint.tensors import JSON
from megatron_kosmos.config import RunConfig
from megatron_kosmos.data.packing.report import PackingReport
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.costs import training_flops
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.engine.trainer import Callback, StepReport
from megatron_kosmos.observability.flops import model_flops_utilization, peak_flops
from megatron_kosmos.observability.metrics import MetricsWriter
from megatron_kosmos.observability.progress import ProgressLine
from megatron_kosmos.prompt import SOURCE_KINDS

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves at intervals, at the end, and where the run is interrupted."""

    def __init__(
        self, run: RunConfig, runner: StepRunner, store: CheckpointStore, state: Mapping[str, JSON], first_step: int = 0
    ) -> None:
        """`state` goes into every checkpoint's JSON; after `first_step` steps there is nothing new to save.

        Raises CheckpointError on every rank alike.
        """
        self.saved_step = first_step
        self.every, self.is_asynchronous = run.checkpoint.every, run.checkpoint.asynchronous
        self.runner, self.state = runner, state
        self.saver = store.saver(runner.stage)
        logger.info("checkpoints: a copy in %s of host memory first", decimal(self.saver.background.num_bytes))

    def after_step(self, report: StepReport) -> None:
        """Save if it is time to, and hear of the save that is under way. Raises SavingFailed on every rank alike."""
        with self.runner.timers.section("save"):
            self.saver.background.poll()
            if report.is_due(self.every):
                self._save(report.step)
            if report.is_last or not self.is_asynchronous:
                self.saver.background.wait()

    def on_interruption(self, step: int) -> None:
        """Have a whole checkpoint of this very step. Raises SavingFailed on every rank alike."""
        with self.runner.timers.section("save"):
            if self.saved_step != step:
                self._save(step)
            self.saver.background.wait()

    def _save(self, step: int) -> None:
        self.saver.save(step, self.state)
        self.saved_step = step

    def close(self) -> None:
        """Wait for what is being written."""
        self.saver.background.close()


class PackingMetrics(Callback):
    """Puts what is known of the packing into the metrics; on rank 0, before `Metrics`."""

    def __init__(self, run: RunConfig, report: PackingReport) -> None:
        self.every = run.logging.metrics_every
        self.scalars = {"packing_efficiency": report.efficiency, "documents_cut": report.documents_cut}

    def after_step(self, report: StepReport) -> None:
        """Add the scalars where metrics are written anyway."""
        if report.is_due(self.every) or report.scalars:
            report.scalars.update(self.scalars)


class Metrics(Callback):
    """Writes a step's numbers and moves the progress line; on rank 0."""

    def __init__(
        self, run: RunConfig, runner: StepRunner, writer: MetricsWriter, world_size: int, first_step: int
    ) -> None:
        """`first_step` is the number of steps done before this process started."""
        self.run, self.runner, self.writer, self.world_size = run, runner, writer, world_size
        self.progress = ProgressLine(run.training.steps, first_step + 1, Console())
        self.progress.__enter__()
        device = runner.topology.device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def after_step(self, report: StepReport) -> None:
        """Write the line of metrics.jsonl and the points in TensorBoard."""
        result = report.result
        tokens = self.run.training.global_batch_size * self.run.data.sequence_length
        tokens_per_second = tokens / report.seconds
        self.progress.update(report.step, result.sums.mean, tokens_per_second)
        seconds = self.runner.timers.collect()
        if not report.is_due(self.run.logging.metrics_every) and not report.scalars:
            return
        flops = training_flops(self.run, tokens, result.num_images)
        self.writer.write(
            report.step,
            {
                "loss": result.sums.mean,
                **{f"loss_{kind}": result.sums.mean_of(kind) for kind in SOURCE_KINDS},
                "grad_norm": result.grad_norm,
                "lr": result.learning_rate,
                "tokens": report.step * tokens,
                "target_tokens": result.num_targets,
                "images": result.num_images,
                "tokens_per_second": tokens_per_second,
                "images_per_second": result.num_images / report.seconds,
                "mfu": model_flops_utilization(flops, report.seconds, self.world_size, self.peak),
                "seconds_total": report.seconds,
                **seconds,
                **report.scalars,
            },
        )

    def close(self) -> None:
        """End the progress line and flush the files."""
        self.progress.__exit__(None, None, None)
        self.writer.close()


class Profiling(Callback):
    """Records steps with torch.profiler for TensorBoard's trace viewer."""

    def __init__(self, run: RunConfig, first_step: int, rank: int) -> None:
        """`first_step` is the number of steps done before this process started."""
        assert run.logging.profile_steps is not None
        first, last = run.logging.profile_steps
        delay = max(0, first - 1 - first_step)
        warmup = min(1, delay)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=delay - warmup, warmup=warmup, active=last - first + 1, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(run.run_dir / "tensorboard"), worker_name=f"rank_{rank}"),
        )
        self.profiler.start()

    def after_step(self, report: StepReport) -> None:
        """Tell the profiler that a step ended."""
        self.profiler.step()

    def close(self) -> None:
        """Stop recording and write the trace."""
        self.profiler.stop()
