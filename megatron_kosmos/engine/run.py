"""A training run from its configuration to its last checkpoint."""

import logging
import time
from contextlib import closing

import torch
import torch.distributed as dist

from megatron_kosmos.checkpoint.folders import CHECKPOINTS
from megatron_kosmos.checkpoint.tensors import JSON
from megatron_kosmos.config import RunConfig, save_config
from megatron_kosmos.data.corpora.corpus import data_fingerprint
from megatron_kosmos.data.loading.loader import ImageFormat, StepLoader
from megatron_kosmos.data.packing.report import PackingReport
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.callbacks import Checkpointing, Metrics, PackingMetrics, Profiling
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.health import EndOfHealth, HealthMonitor, History
from megatron_kosmos.engine.heldout import HeldoutEvaluation
from megatron_kosmos.engine.memory_report import MemoryReport
from megatron_kosmos.engine.reading import PLANS, failing_together, geometry_of, read_together
from megatron_kosmos.engine.rollbacks import without_spikes
from megatron_kosmos.engine.stragglers import StragglerReport
from megatron_kosmos.engine.supervision import Supervision
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.engine.trainable import trainable_text
from megatron_kosmos.engine.trainer import Callback, Trainer
from megatron_kosmos.observability.metrics import MetricsWriter
from megatron_kosmos.observability.trackers import open_trackers
from megatron_kosmos.parallel.agreement import number_of_rank_0
from megatron_kosmos.parallel.topology import Topology, build_topology

logger = logging.getLogger(__name__)


def train(run: RunConfig, device: torch.device, supervision: Supervision | None = None) -> None:
    """Train `run` on every rank of the running process group, from its newest checkpoint if it has one.

    Raises, on every rank alike: ConfigError where `optimizer.groups` doesn't fit the model, CheckpointError where the
    checkpoint holds another model or other data, SavingFailed for one that cannot be written, ReadingFailed for corpora
    or metrics that a rank cannot read, Unhealthy where it would go on badly, Interrupted when one rank was asked to
    stop, with a whole checkpoint, and where the loss jumped and it is to go back to the newest.
    """
    supervision = supervision or Supervision()
    interruption, heartbeat = supervision.interruption, supervision.heartbeat
    topology = build_topology(run.parallel, device)
    if supervision.watchdog is not None:
        supervision.watchdog.join(number_of_rank_0(time.time_ns(), device), dist.get_world_size())
    store = CheckpointStore(run.run_dir / CHECKPOINTS, topology, run.checkpoint.keep_last, run.checkpoint.keep_every)
    run = without_spikes(run, store.mesh)
    with failing_together(topology, interruption):
        data = data_fingerprint(run.data)
    heartbeat.enter("building the model")
    stage, first_step = build_stage(run, topology, store, data)
    logger.info("%s: %s", topology.describe(), "from the start" if not first_step else f"resumed at step {first_step}")
    if dist.get_rank() == 0:
        logger.info("%s", trainable_text(run, stage.weights))
    if first_step >= run.training.steps:
        logger.info("%s has all its %d steps", run.run_dir, run.training.steps)
        return
    runner = StepRunner(run, stage, topology, heartbeat)
    heartbeat.enter("opening the data")
    with failing_together(topology, interruption):
        loader = _loader(run, topology)
        packing = loader.packing_report()
        writer = MetricsWriter(run.run_dir, first_step + 1, open_trackers(run)) if dist.get_rank() == 0 else None
    heartbeat.enter("planning the run")
    if dist.get_rank() == 0:
        logger.info("%s", packing)
    if writer is not None:
        save_config(run, run.run_dir / "config.yaml")
    history = History.of_checkpoint(stage.checkpoint, run.health.spike_window)
    state: dict[str, JSON] = {"config": run.model_dump(mode="json"), "data": data}
    checkpointing = Checkpointing(run, runner, store, lambda: {**state, "health": history.to_json()}, first_step)
    monitor = HealthMonitor(run, history, checkpointing, loader)
    # Checkpoints last, so that none is there before the metrics of its step: a killed run has every step's once.
    callbacks = [
        *_evaluations(run, runner, writer, first_step),
        monitor,
        *_metrics(run, runner, writer, first_step, packing),
        EndOfHealth(run, monitor),
        checkpointing,
    ]
    read = read_together(loader.steps(first_step, run.training.steps), topology, interruption, runner.timers)
    with closing(read) as steps:
        Trainer(run, runner, callbacks).train(first_step, steps)
    heartbeat.enter("ending")
    if loader.num_bad_images:
        logger.warning("%d pictures did not decode and were shown blank", loader.num_bad_images)


def _evaluations(run: RunConfig, runner: StepRunner, writer: MetricsWriter | None, first_step: int) -> list[Callback]:
    """Return what measures after each step. `writer`: on rank 0."""
    device = runner.topology.device
    callbacks: list[Callback] = [
        StragglerReport(run, device),
        MemoryReport(run, device),
        HeldoutEvaluation(run, runner, writer),
    ]
    if run.logging.profile_steps is not None:
        callbacks.append(Profiling(run, first_step, dist.get_rank()))
    return callbacks


def _metrics(
    run: RunConfig, runner: StepRunner, writer: MetricsWriter | None, first_step: int, packing: PackingReport
) -> list[Callback]:
    """Return what writes the numbers of each step, on rank 0."""
    if writer is None:
        return []
    return [PackingMetrics(run, packing), Metrics(run, runner, writer, dist.get_world_size(), first_step)]


def _loader(run: RunConfig, topology: Topology) -> StepLoader:
    """Return what this rank reads of its data rank's batches."""
    images = ImageFormat(run.model.resampler.num_latents, run.model.vision.image_size)
    return StepLoader(run.data, images, geometry_of(run, topology), run.training.seed, run.run_dir / PLANS)
