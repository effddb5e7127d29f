"""What a run would be, without starting it: every pipeline stage built on the meta device by one process.

Weights have shapes but no memory, and torch's pretended process group answers for all ranks, so the plan of a thousand
GPUs takes a laptop seconds.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.engine.costs import PieceCosts, forward_costs, images_per_sequence, training_costs
from megatron_kosmos.engine.memory import RankMemory, memory_formula, rank_memory, snapshot_bytes
from megatron_kosmos.engine.trainable import PARTS, Part, Weight, check_groups, trainable_table, weights_of
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.stages import Chunk
from megatron_kosmos.parallel.topology import Topology, build_topology, stop_process_group


@dataclass(frozen=True)
class PartSize:
    """Numbers of parameters, those of all tensor-parallel ranks together."""

    trained: int = 0
    frozen: int = 0

    def __add__(self, other: "PartSize") -> "PartSize":
        return PartSize(self.trained + other.trained, self.frozen + other.frozen)

    @property
    def total(self) -> int:
        """Trained and frozen."""
        return self.trained + self.frozen


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage."""

    chunks: tuple[Chunk, ...]
    """One, or several under the interleaved schedule."""
    parts: dict[Part, PartSize]
    """What the stage holds. A tied embedding's copy on the last stage counts as its output."""
    memory: RankMemory
    """Bytes on each rank of the stage."""
    snapshot: int
    """Bytes of host memory beside each rank that checkpoints are copied to."""
    forward_share: float
    """Of the model's counted operations in the forward pass."""
    training_share: float
    """Of those of a training step: what balancing makes even."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(chunk.num_layers for chunk in self.chunks)


@dataclass(frozen=True)
class Plan:
    """What a run would be on `world_size` ranks."""

    run: RunConfig
    world_size: int
    dp_size: int
    parts: dict[Part, PartSize]
    """Parameters of the whole model, each counted once."""
    stages: tuple[StagePlan, ...]
    weights: tuple[Weight, ...]
    """Every parameter of every stage."""

    @property
    def num_microbatches(self) -> int:
        """Microbatches of each data-parallel rank in a step."""
        return self.run.num_microbatches(self.world_size)

    @property
    def tokens_per_step(self) -> int:
        """Positions that a step goes through, image slots included."""
        return self.run.training.global_batch_size * self.run.data.sequence_length

    @property
    def total_tokens(self) -> int:
        """Positions of the whole run."""
        return self.tokens_per_step * self.run.training.steps


def plan(run: RunConfig, world_size: int) -> Plan:
    """Build every stage of `run` on the meta device, and describe what `world_size` ranks would hold and do.

    Raises ConfigError where ranks, batch and layout don't fit each other, or `optimizer.groups` the model; RuntimeError
    inside a process group.
    """
    dp_size = run.data_parallel_size(world_size)
    costs = forward_costs(run), training_costs(run)
    stages, whole = [], list[Weight]()
    for pp_rank in range(run.parallel.pipeline_parallel_size):
        models = _build_stage(run, world_size, pp_rank)
        chunks, weights = tuple(model.chunk for model in models), weights_of(models)
        named = [named for model in models for named in named_parameters(model)]
        memory = rank_memory(named, run, dp_size)
        snapshot = snapshot_bytes(named, run.parallel.tensor_parallel_size, dp_size)
        stages.append(StagePlan(chunks, _parts(weights), memory, snapshot, *(_share(chunks, one) for one in costs)))
        whole += weights
    check_groups(run, whole)
    parts = _parts(weight for weight in whole if not weight.is_tied_copy)
    return Plan(run, world_size, dp_size, parts, tuple(stages), tuple(whole))


def _build_stage(run: RunConfig, world_size: int, pp_rank: int) -> tuple[KosmosModel, ...]:
    """Return the chunks of a stage on the meta device."""
    first_rank = pp_rank * (world_size // run.parallel.pipeline_parallel_size)
    with _pretended_rank(run, first_rank, world_size) as topology, topology.device:
        return build_chunks(run, derive_transformer_config(run), topology)


@contextmanager
def _pretended_rank(run: RunConfig, rank: int, world_size: int) -> Iterator[Topology]:
    """Be `rank` of a process group whose collectives do nothing."""
    if dist.is_initialized():
        raise RuntimeError("a dry run pretends to be every rank in turn; start it outside of a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_topology(run.parallel, torch.device("meta"))
    finally:
        stop_process_group()


def _parts(weights: Iterable[Weight]) -> dict[Part, PartSize]:
    sizes = dict.fromkeys(PARTS, PartSize())
    for weight in weights:
        number = weight.num_elements
        sizes[weight.part] += PartSize(trained=number) if weight.is_trained else PartSize(frozen=number)
    return sizes


def _share(chunks: Iterable[Chunk], costs: PieceCosts) -> float:
    """Return the share of the whole model's operations that fall on `chunks`."""
    held = sum(
        sum(costs.layers[chunk.first_layer : chunk.first_layer + chunk.num_layers])
        + chunk.is_first * costs.vision_side
        + chunk.is_last * costs.output
        for chunk in chunks
    )
    return held / costs.total


def render(plan: Plan, console: Console) -> None:
    """Print the plan as tables that fit 80 columns."""
    for table in (_batch_table(plan), _model_table(plan), _stage_table(plan), _memory_table(plan)):
        console.print(table, "")


def _batch_table(plan: Plan) -> Table:
    run, parallel, training = plan.run, plan.run.parallel, plan.run.training
    table = _table(f"{plan.world_size:,} ranks", "", "")
    table.show_header = False
    layout = (
        f"{parallel.tensor_parallel_size} tensor x {parallel.pipeline_parallel_size} pipeline x {plan.dp_size} data"
    )
    if parallel.virtual_pipeline_parallel_size > 1:
        layout += f", {parallel.virtual_pipeline_parallel_size} chunks a stage"
    if parallel.sequence_parallel:
        layout += ", sequence parallel"
    table.add_row("layout", f"{layout}, ZeRO {parallel.zero_stage}")
    table.add_row("precision", f"{training.precision}, recompute {training.recompute}")
    table.add_row(
        "a step",
        f"{training.global_batch_size:,} sequences = {plan.num_microbatches:,} microbatches x "
        f"{training.micro_batch_size} sequences x {plan.dp_size} data ranks",
    )
    table.add_row("tokens", f"{plan.tokens_per_step:,} a step, {plan.total_tokens:,} in {training.steps:,} steps")
    table.add_row("images", f"{images_per_sequence(run):.1f} a sequence, assumed from the mixture for the shares below")
    return table


def _model_table(plan: Plan) -> Table:
    decoder = plan.run.model.decoder
    padding = decoder.padded_vocab_size - decoder.vocab_size
    total = sum(plan.parts.values(), PartSize()).total
    table = trainable_table(plan.run, plan.weights)
    table.caption = f"{table.caption}\n{total:,} in all, with {padding:,} rows of padding\nin each vocabulary matrix"
    return table


def _stage_table(plan: Plan) -> Table:
    table = _table("pipeline stages", "stage", "layers", "also holds", numbers=("parameters", "forward", "training"))
    for number, stage in enumerate(plan.stages):
        table.add_row(
            str(number),
            " ".join(_layer_range(chunk) for chunk in stage.chunks),
            ", ".join(part for part in PARTS if part != "decoder" and stage.parts[part].total),
            f"{sum(size.total for size in stage.parts.values()):,}",
            f"{stage.forward_share:.1%}",
            f"{stage.training_share:.1%}",
        )
    table.caption = "shares of the counted operations of a forward pass and of a training step"
    return table


def _memory_table(plan: Plan) -> Table:
    table = _table(
        "memory of a rank", "stage", numbers=("weights", "gradients", "optimizer", "together", "on the host")
    )
    for number, stage in enumerate(plan.stages):
        memory = stage.memory
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.total, stage.snapshot)
        table.add_row(str(number), *(decimal(size, precision=2) for size in sizes))
    table.caption = (
        f"{memory_formula(plan.run, plan.dp_size)}\nactivations and communication buckets come on top\n"
        f"on the host: a copy of its share of a checkpoint, (4 N + 8 T) / {plan.dp_size}\n"
        "with what tensor ranks hold alike counted once"
    )
    return table


def _table(title: str, *texts: str, numbers: Iterable[str] = ()) -> Table:
    table = Table(*texts, title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _layer_range(chunk: Chunk) -> str:
    last = chunk.first_layer + chunk.num_layers - 1
    return str(last) if chunk.num_layers == 1 else f"{chunk.first_layer}-{last}"
