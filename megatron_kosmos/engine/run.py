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
from megatron_kosmos.engine.heldout import HeldoutEvaluation
from megatron_kosmos.engine.memory_report import MemoryReport
from megatron_kosmos.engine.reading import PLANS, failing_together, geometry_of, read_together
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
    or metrics that a rank cannot read, Interrupted when one rank was asked to stop; a checkpoint is then whole.
    """
    supervision = supervision or Supervision()
    interruption, heartbeat = supervision.interruption, supervision.heartbeat
    topology = build_topology(run.parallel, device)
    if supervision.watchdog is not None:
        supervision.watchdog.join(number_of_rank_0(time.time_ns(), device), dist.get_world_size())
    store = CheckpointStore(run.run_dir / CHECKPOINTS, topology, run.checkpoint.keep_last, run.checkpoint.keep_every)
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
    callbacks = _callbacks(run, runner, writer, first_step, packing)
    # Last, so that no checkpoint is there before the metrics of its step: a run that is killed has every step's once.
    state: dict[str, JSON] = {"config": run.model_dump(mode="json"), "data": data}
    callbacks.append(Checkpointing(run, runner, store, state, first_step))
    read = read_together(loader.steps(first_step, run.training.steps), topology, interruption, runner.timers)
    with closing(read) as steps:
        Trainer(run, runner, callbacks).train(first_step, steps)
    heartbeat.enter("ending")
    if loader.num_bad_images:
        logger.warning("%d pictures did not decode and were shown blank", loader.num_bad_images)


def _callbacks(
    run: RunConfig, runner: StepRunner, writer: MetricsWriter | None, first_step: int, packing: PackingReport
) -> list[Callback]:
    """Return what happens after each step, but for checkpoints. `writer`: on rank 0."""
    device = runner.topology.device
    callbacks = [StragglerReport(run, device), MemoryReport(run, device), HeldoutEvaluation(run, runner, writer)]
    if run.logging.profile_steps is not None:
        callbacks.append(Profiling(run, first_step, dist.get_rank()))
    if writer is not None:
        callbacks.append(PackingMetrics(run, packing))
        callbacks.append(Metrics(run, runner, writer, dist.get_world_size(), first_step))
    return callbacks


def _loader(run: RunConfig, topology: Topology) -> StepLoader:
    """Return what this rank reads of its data rank's batches."""
    images = ImageFormat(run.model.resampler.num_latents, run.model.vision.image_size)
    return StepLoader(run.data, images, geometry_of(run, topology), run.training.seed, run.run_dir / PLANS)
