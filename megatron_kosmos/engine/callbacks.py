"""What happens beside the training: evaluation, checkpoints, metrics and profiles."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from megatron_kosmos.observability.timers import TimeSplit
from megatron_kosmos.prompt import SOURCE_KINDS

logger = logging.getLogger(__name__)


StateOf = Callable[[], Mapping[str, JSON]]


class Checkpointing(Callback):
    """Saves at intervals, at the end, and where the run is interrupted."""

    def __init__(
        self, run: RunConfig, runner: StepRunner, store: CheckpointStore, state: StateOf, first_step: int = 0
    ) -> None:
        """What `state` gives goes into a checkpoint's JSON; after `first_step` steps there is nothing new to save.

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
        self.saver.save(step, self.state())
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


@dataclass
class Since:
    """What was done since the last line of metrics."""

    num_steps: int = 0
    seconds: float = 0.0
    """In steps, callbacks left out."""
    num_images: int = 0
    flops: int = 0

    def add(self, seconds: float, num_images: int, flops: int) -> None:
        """Count one more step."""
        self.num_steps += 1
        self.seconds += seconds
        self.num_images += num_images
        self.flops += flops


class Metrics(Callback):
    """Writes a step's numbers and moves the progress line; on rank 0, after the callbacks that add numbers."""

    def __init__(
        self, run: RunConfig, runner: StepRunner, writer: MetricsWriter, world_size: int, first_step: int
    ) -> None:
        """`first_step` is the number of steps done before this process started."""
        self.run, self.runner, self.writer, self.world_size = run, runner, writer, world_size
        self.progress = ProgressLine(run.training.steps, first_step + 1, Console())
        self.progress.__enter__()
        device = runner.topology.device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.split, self.since = TimeSplit(runner.timers), Since()

    def after_step(self, report: StepReport) -> None:
        """Write the line of metrics.jsonl and the points in TensorBoard: of this step, rates since the line before."""
        result = report.result
        tokens = self.run.training.global_batch_size * self.run.data.sequence_length
        slots = result.num_images * self.run.model.resampler.num_latents
        left = self.progress.update(report.step, result.sums.mean, tokens / report.seconds)
        flops = training_flops(self.run, tokens, result.num_images, result.num_attention_pairs)
        self.since.add(report.seconds, result.num_images, flops)
        if not report.is_due(self.run.logging.metrics_every) and not report.scalars:
            return
        since, self.since = self.since, Since()
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
                "image_text_ratio": slots / result.num_targets if result.num_targets else None,
                "tokens_per_second": since.num_steps * tokens / since.seconds,
                "images_per_second": since.num_images / since.seconds,
                "mfu": model_flops_utilization(since.flops, since.seconds, self.world_size, self.peak),
                "seconds_left": left,
                **self.split.collect(since.num_steps),
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
