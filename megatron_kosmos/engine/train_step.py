"""One optimizer step: megatron-core's schedule over the microbatches, gradient finalization, ZeRO's update.

The loss of a step is the sum over all its target tokens divided by their number N, whatever microbatch or data rank
they fall on. N is known before the first forward pass, so each microbatch returns sum * microbatches * dp / N and the
averages that the schedule and DeepSpeed take give sum / N.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.loss import TokenLosses
from megatron_kosmos.observability.compute_timer import ComputeTimer
from megatron_kosmos.observability.heartbeat import Heartbeat
from megatron_kosmos.observability.timers import Timers
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import Topology
from megatron_kosmos.prompt import SOURCE_KINDS, SourceKind

LossFunction = Callable[[TokenLosses], tuple[Tensor, dict[str, Tensor]]]
Microbatches = Iterator[tuple[int, MultimodalBatch]]


@dataclass(frozen=True)
class LossSums:
    """Sums of target losses in nats and numbers of targets by kind of source, over all data ranks."""

    losses: dict[SourceKind, float]
    targets: dict[SourceKind, int]

    @property
    def mean(self) -> float:
        """Loss a target token, nats; 0 where there were none."""
        return sum(self.losses.values()) / max(1, sum(self.targets.values()))

    def mean_of(self, kind: SourceKind) -> float | None:
        """Loss a target token of one kind; None where there were none."""
        return self.losses[kind] / self.targets[kind] if self.targets[kind] else None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    sums: LossSums
    grad_norm: float
    """Global norm before clipping; 0 for a step without targets, NaN for one that was skipped."""
    learning_rate: float
    num_targets: int
    num_images: int
    num_attention_pairs: int
    """Pairs of a query and a key that each decoder layer's attention computes, over all data ranks."""
    compute_seconds: float
    """This rank's own forward and backward passes (`ComputeTimer`)."""

    @property
    def is_skipped(self) -> bool:
        """Whether loss or gradients were not finite, on some rank: the weights are then as before, on every rank."""
        return not math.isfinite(self.grad_norm)


class StepRunner:
    """Runs optimizer steps and evaluations of one rank's stage; every rank calls it alike."""

    def __init__(self, run: RunConfig, stage: Stage, topology: Topology, heartbeat: Heartbeat | None = None) -> None:
        """`heartbeat` hears what is being done."""
        self.run, self.stage, self.topology = run, stage, topology
        self.heartbeat = heartbeat or Heartbeat()
        self.timers = Timers(self.heartbeat)
        self.compute_timer = ComputeTimer(topology.device)
        for chunk in stage.chunks:
            chunk.config.timers = self.compute_timer
        self._schedule = get_forward_backward_func(
            pp_size=topology.pp_size, vp_size=topology.virtual_size if topology.virtual_size > 1 else None
        )

    def train(self, step: int, microbatches: Sequence[MultimodalBatch]) -> StepResult:
        """Take optimizer step `step` on this data rank's `microbatches` (the same number on every rank).

        A step without a target token anywhere leaves the weights alone, and so does one with a loss or gradient that
        is not finite.
        """
        num_targets, num_images, num_pairs = self._count(microbatches)
        for chunk in self.stage.chunks:
            chunk.train()
        scale = len(microbatches) * self.topology.dp_size / max(1, num_targets)
        with self.timers.section("forward_backward"):
            self.compute_timer.collect()  # what an evaluation left
            outputs = self._run_schedule(microbatches, self._forward_step(step, scale), forward_only=False)
            sums = self._reduce(outputs)
            compute_seconds = self.compute_timer.collect()
        if num_targets == 0:
            self.stage.optimizer.drop_gradients()
            return StepResult(sums, 0.0, 0.0, 0, num_images, num_pairs, compute_seconds)
        with self.timers.section("finalize"):
            self.stage.optimizer.finalize()
        with self.timers.section("step"):
            grad_norm, learning_rate = self.stage.optimizer.step(step)
        return StepResult(sums, grad_norm, learning_rate, num_targets, num_images, num_pairs, compute_seconds)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MultimodalBatch]) -> LossSums:
        """Return the losses of `microbatches` without dropout, over all data ranks."""
        self.heartbeat.advance()
        for chunk in self.stage.chunks:
            chunk.eval()
        return self._reduce(self._run_schedule(microbatches, self._forward_step(0, 1.0), forward_only=True))

    @torch.no_grad()
    def likeliest_tokens(self, batch: MultimodalBatch, column: int) -> Tensor:
        """Return the likeliest token [B] after position `column` of each row, on every rank.

        All ranks pass the same batch, with all images. Broadcast from the last stage.
        """
        self.heartbeat.advance()
        batch = batch.for_tensor_rank(self.topology.tp_rank, self.topology.tp_size)
        for chunk in self.stage.chunks:
            chunk.eval()

        def forward(iterator: Microbatches, chunk: KosmosModel) -> tuple[Tensor, Callable[..., Tensor]]:
            _, microbatch = next(iterator)
            output = self._module(chunk)(microbatch.to(self.topology.device), logits_of=slice(column, column + 1))
            return output, lambda logits_B1V, non_loss_data: logits_B1V[:, 0].argmax(-1)

        # The interleaved schedule runs no fewer microbatches than there are stages.
        repeats = self.topology.pp_size if self.topology.virtual_size > 1 else 1
        outputs = self._run_schedule([batch] * repeats, forward, forward_only=True, collect_non_loss_data=True)
        tokens = outputs[0] if outputs else torch.zeros(len(batch.input_ids), dtype=torch.int64)
        tokens = tokens.to(self.topology.device)
        if self.topology.pp_size > 1:
            dist.broadcast(tokens, group_src=self.topology.pp_size - 1, group=self.topology.pp_group)
        return tokens.cpu()

    def _run_schedule(
        self, microbatches: Sequence[MultimodalBatch], forward_step: Callable[..., Any], **options: bool
    ) -> list[Any]:
        chunks = self.stage.chunks
        iterators: list[Microbatches] = [iter(enumerate(microbatches)) for _ in chunks]
        outputs: list[Any] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=self.run.data.sequence_length,
            micro_batch_size=self.run.training.micro_batch_size,
            **options,
        )
        return outputs

    def _forward_step(
        self, step: int, scale: float
    ) -> Callable[[Microbatches, KosmosModel], tuple[Tensor | TokenLosses, LossFunction]]:
        """Return the function that megatron-core's schedule calls for each microbatch and chunk."""

        def forward(iterator: Microbatches, chunk: KosmosModel) -> tuple[Tensor | TokenLosses, LossFunction]:
            index, batch = next(iterator)
            batch = batch.to(self.topology.device)
            seed_microbatch(self.run.training.seed, step, index, chunk.chunk.index, self.topology)
            output = self._module(chunk)(batch)

            def loss(losses: TokenLosses) -> tuple[Tensor, dict[str, Tensor]]:
                # The factor of a total that is not finite is NaN, so that the gradients, which might be finite, tell.
                factor = scale + 0.0 * losses.total.detach()
                return losses.total * factor, {"sums": _sums_by_source(losses.each_BT, batch)}

            return output, loss

        return forward

    def _module(self, chunk: KosmosModel) -> nn.Module:
        return self.stage.optimizer.module_to_run or chunk

    def _count(self, microbatches: Sequence[MultimodalBatch]) -> tuple[int, int, int]:
        """Return target tokens, images and attention pairs of the whole step. All-reduce over the data ranks."""
        counts = [
            (batch.num_target_tokens, len(batch.image_positions), batch.num_attention_pairs) for batch in microbatches
        ]
        total = torch.tensor(counts, device=self.topology.device).sum(0)
        dist.all_reduce(total, group=self.topology.dp_group)
        num_targets, num_images, num_pairs = total.tolist()
        return num_targets, num_images, num_pairs

    def _reduce(self, outputs: Sequence[dict[str, Tensor]]) -> LossSums:
        """Add up the microbatches' sums of the last stage's first tensor ranks. All-reduce over all ranks.

        So all ranks decide by the same numbers, even if a faulty tensor rank has others.
        """
        sums = torch.zeros(2, len(SOURCE_KINDS), dtype=torch.float64, device=self.topology.device)
        if self.topology.is_last_stage and self.topology.tp_rank == 0:
            sums += torch.stack([output["sums"] for output in outputs]).sum(0)
        dist.all_reduce(sums)
        losses, targets = sums.tolist()
        return LossSums(
            dict(zip(SOURCE_KINDS, losses, strict=True)),
            {kind: round(count) for kind, count in zip(SOURCE_KINDS, targets, strict=True)},
        )


def _sums_by_source(losses_BT: Tensor, batch: MultimodalBatch) -> Tensor:
    """Return [2, kinds]: loss sums and target counts of each kind of source, fp64."""
    sums = losses_BT.new_zeros(2, len(SOURCE_KINDS), dtype=torch.float64)
    sums[0].index_add_(0, batch.sources, losses_BT.sum(1).double())
    sums[1].index_add_(0, batch.sources, batch.loss_mask.sum(1).double())
    return sums
