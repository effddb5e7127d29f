"""The composition root: from a configuration and a topology to the parts of a training run."""

import logging

import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.checkpointing import CheckpointStore, restore_optimizer, restore_weights
from megatron_kosmos.engine.costs import training_costs
from megatron_kosmos.engine.resumption import changed_settings
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.engine.trainable import check_groups, describe_changes, trains_below, weights_of_model
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.kernels import PLAIN, Kernels, choose_kernels
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.magneto import transformer_config
from megatron_kosmos.model.names import TIED_EMBEDDING, named_parameters
from megatron_kosmos.optim.zero import ZeroOptimizer
from megatron_kosmos.parallel.stages import balance_layers, chunks_of_stage
from megatron_kosmos.parallel.topology import Topology

logger = logging.getLogger(__name__)


def build_stage(
    run: RunConfig, topology: Topology, store: CheckpointStore | None = None, data: str | None = None
) -> tuple[Stage, int]:
    """Build what this rank trains; return it with the optimizer steps that it has behind it.

    With a `store` that holds a checkpoint the stage continues from the newest one, else it starts from the seed.
    Raises, on every rank alike: ConfigError where `optimizer.groups` names what isn't there or freezes everything,
    CheckpointError where the checkpoint holds another model, or was trained on other data than the fingerprint `data`.
    """
    kernels = choose_kernels(run, topology.device)
    if dist.get_rank() == 0:
        logger.info("kernels: %s", kernels)
    chunks = build_chunks(run, derive_transformer_config(run, kernels), topology)
    weights = weights_of_model(chunks, topology)
    check_groups(run, weights)
    for chunk in chunks:
        chunk.trains_below = trains_below(weights, chunk.chunk.index)
    named = [named for chunk in chunks for named in named_parameters(chunk)]
    folder = store.latest() if store is not None else None
    snapshot = store.load(folder, named, run, data) if store is not None and folder is not None else None
    if snapshot is None:
        for chunk in chunks:
            initialize(chunk, run.training.seed)
    else:
        restore_weights(named, snapshot)
        for change in (*changed_settings(snapshot.state, run), *describe_changes(weights, snapshot.trained)):
            logger.info("%s", change)
    for chunk in chunks:
        chunk.to(topology.device)
    names = {one.parameter: one.name for chunk in chunks for one in named_parameters(chunk)}
    optimizer = ZeroOptimizer(chunks, names, _tied_weight(names), run, topology)
    stage = Stage(chunks, optimizer, tuple(weights), {} if snapshot is None else snapshot.state)
    if snapshot is None:
        return stage, 0
    restore_optimizer(stage, snapshot)
    return stage, snapshot.step


def build_chunks(run: RunConfig, transformer: TransformerConfig, topology: Topology) -> tuple[KosmosModel, ...]:
    """Build the chunks of this rank's stage with weights allocated but not set."""
    # Registers the random stream that tensor-parallel modules ask for; seed_microbatch sets it before each use.
    model_parallel_cuda_manual_seed(run.training.seed)
    layers = decoder_layers_of_chunks(run)
    chunks = tuple(
        KosmosModel(run.model, transformer, chunk, topology)
        for chunk in chunks_of_stage(layers, topology.pp_rank, topology.pp_size)
    )
    for named in (named for chunk in chunks for named in named_parameters(chunk)):
        if run.optimizer.freezes(named.name):
            named.parameter.requires_grad_(False)
    return chunks


def derive_transformer_config(run: RunConfig, kernels: Kernels = PLAIN) -> TransformerConfig:
    """Derive megatron-core's configuration of the decoder, which computes with `kernels`."""
    return transformer_config(run.model.decoder, run.parallel, run.training, decoder_layers_of_chunks(run), kernels)


def decoder_layers_of_chunks(run: RunConfig) -> tuple[int, ...]:
    """Return the decoder layers of every chunk in model order: as configured, or balanced by counted cost."""
    if run.parallel.chunk_layers is not None:
        return run.parallel.chunk_layers
    costs = training_costs(run)
    ends = costs.vision_side / costs.mean_layer, costs.output / costs.mean_layer
    parallel = run.parallel
    return balance_layers(
        run.model.decoder.num_layers,
        parallel.pipeline_parallel_size,
        parallel.virtual_pipeline_parallel_size,
        *ends,
    )


def _tied_weight(names: dict[nn.Parameter, str]) -> nn.Parameter | None:
    return next((parameter for parameter, name in names.items() if name == TIED_EMBEDDING), None)
