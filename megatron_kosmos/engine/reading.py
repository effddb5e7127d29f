"""What each rank reads of the batches, what its tensor-parallel group shares, and how all end where one cannot read.

Shape letters: M microbatches of a step, B rows, T tokens.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import RunConfig
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.loading.loader import BatchGeometry, RankPart
from megatron_kosmos.engine.interruption import Interrupted, Interruption
from megatron_kosmos.observability.metrics import MetricsError
from megatron_kosmos.observability.timers import Timers
from megatron_kosmos.parallel.agreement import agree
from megatron_kosmos.parallel.topology import Topology

PLANS = "plans"
"""Folder of the run that says what is held out and what is packed into which sequence; made again when it is gone."""
Steps = Generator[list[MultimodalBatch]]


class ReadingFailed(DataError):
    """A rank could not read; raised on all ranks alike, with the rank and what it said."""


def part_of(topology: Topology) -> RankPart:
    """Return what this rank reads: tokens for its tensor group at the ends of the pipeline, its pictures on stage 0."""
    return RankPart(
        tokens=needs_tokens(topology) and topology.tp_rank == 0,
        images=topology.is_first_stage,
        tp_rank=topology.tp_rank,
        tp_size=topology.tp_size,
    )


def geometry_of(run: RunConfig, topology: Topology) -> BatchGeometry:
    """Return how the batches of a run fall to this rank."""
    return BatchGeometry(
        run.training.micro_batch_size,
        run.training.global_batch_size,
        topology.dp_rank,
        topology.dp_size,
        part=part_of(topology),
    )


def needs_tokens(topology: Topology) -> bool:
    """Whether this rank holds the embedding or the loss."""
    return topology.is_first_stage or topology.is_last_stage


@contextmanager
def failing_together(
    topology: Topology, interruption: Interruption | None = None, timers: Timers | None = None
) -> Iterator[None]:
    """Agree with all ranks, at the end of the block, on whether to go on (a collective over all ranks).

    Raises, on every rank: ReadingFailed when one raised DataError or MetricsError inside, else Interrupted when one
    was asked to stop. `timers` tells working from waiting for the others.
    """
    failure, timers = None, timers or Timers()
    try:
        with timers.section("data"):
            yield
    except (DataError, MetricsError) as error:
        failure = str(error)
    received = interruption.received if interruption is not None else None
    with timers.section("wait"):
        agreed = agree(failure, received is not None, topology.device)
    if agreed.failure is not None:
        raise ReadingFailed(agreed.failure)
    if agreed.stopped_rank is not None:
        asked = f"rank {agreed.stopped_rank} was asked to stop"
        raise Interrupted(asked if received is None else f"asked to stop by {received.name}")


def read_together(
    steps: Steps, topology: Topology, interruption: Interruption | None = None, timers: Timers | None = None
) -> Steps:
    """Yield the steps that this rank's loader reads, with the tokens of its tensor group; closes the loader.

    All ranks have as many steps. Raises as `failing_together` when the loader of one raises DataError or one was asked
    to stop; that step is then not taken.
    """
    with closing(steps):
        while True:
            step: list[MultimodalBatch] | None = None
            with failing_together(topology, interruption, timers):
                step = next(steps, None)
            if step is None:
                return
            yield share_tokens(step, topology)


def share_tokens(step: Sequence[MultimodalBatch], topology: Topology) -> list[MultimodalBatch]:
    """Return the step with the tokens that tensor rank 0 has read. Broadcast over the tensor group, once a step."""
    if topology.tp_size == 1 or not needs_tokens(topology):
        return list(step)
    if topology.tp_rank == 0:
        tokens_M2BT = torch.stack([torch.stack((batch.input_ids, batch.labels)) for batch in step])
        tokens_M2BT = tokens_M2BT.to(topology.device)
    else:
        shape = (len(step), 2, *step[0].loss_mask.shape)
        tokens_M2BT = torch.empty(shape, dtype=torch.int64, device=topology.device)
    dist.broadcast(tokens_M2BT, group=topology.tp_group, group_src=0)
    return [
        replace(batch, input_ids=input_ids, labels=labels)
        for batch, (input_ids, labels) in zip(step, tokens_M2BT, strict=True)
    ]
