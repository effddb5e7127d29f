"""Measuring a model in training on held-out data, under its own layout: losses by corpus, and captions of pictures.

Shape letters: B rows, T tokens, I images, S image side.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import RunConfig
from megatron_kosmos.data.images.transform import load_image
from megatron_kosmos.data.loading.loader import ImageFormat, check_heldout, heldout_batches, heldout_captions
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.reading import PLANS, failing_together, geometry_of, read_together
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.engine.trainer import Callback, StepReport
from megatron_kosmos.observability.metrics import MetricsWriter


class Captioned(NamedTuple):
    """Pictures with what the corpus says of them and what the model does; only rank 0 has the first two."""

    images: Tensor
    """[I, 3, S, S], normalized; [0, 3, S, S] where there is no vision tower."""
    expected: list[str]
    """[] on ranks other than tensor rank 0 of stage 0."""
    generated: list[str]


class HeldoutEvaluation(Callback):
    """Evaluates every so many steps and at the end; puts losses and exact matches into the step's metrics."""

    def __init__(self, run: RunConfig, runner: StepRunner, writer: MetricsWriter | None) -> None:
        """`writer`, on rank 0, gets the captioned pictures. A collective over all ranks.

        Raises ReadingFailed, on every rank, for corpora or pictures that one cannot read.
        """
        self.run, self.runner, self.writer = run, runner, writer
        self.images = ImageFormat(run.model.resampler.num_latents, run.model.vision.image_size)
        self.tokenizer = KosmosTokenizer.load(run.data.tokenizer)
        self.geometry, self.plan_folder = geometry_of(run, runner.topology), run.run_dir / PLANS
        self.num_pictures, self.pictures, self.captions = self._read_pictures()

    def after_step(self, report: StepReport) -> None:
        """Evaluate if it is time to."""
        if not self.run.data.heldout or not report.is_due(self.run.evaluation.every):
            return
        with self.runner.timers.section("evaluate"):
            report.scalars.update(self.losses())
            if self.num_pictures:
                captioned = self.caption()
                if self.writer is not None:
                    matches = [a == b for a, b in zip(captioned.expected, captioned.generated, strict=True)]
                    report.scalars["heldout_caption_exact_match"] = sum(matches) / len(matches)
                    cards = [f"{g}  (is: {e})" for g, e in zip(captioned.generated, captioned.expected, strict=True)]
                    self.writer.images_with_captions("heldout", report.step, captioned.images, cards)

    def losses(self) -> dict[str, float]:
        """Return `heldout_loss_KIND`, the loss in nats a target token over the held-out corpora of each kind."""
        sums: dict[str, float] = {}
        targets: dict[str, int] = {}
        for corpus in self.run.data.heldout:
            batches = heldout_batches(
                self.run.data,
                corpus,
                self.images,
                self.geometry,
                self.run.evaluation.sequences,
                self.plan_folder,
            )
            for microbatches in read_together(batches, self.runner.topology):
                measured = self.runner.evaluate(microbatches)
                sums[corpus.kind] = sums.get(corpus.kind, 0.0) + measured.losses[corpus.kind]
                targets[corpus.kind] = targets.get(corpus.kind, 0) + measured.targets[corpus.kind]
        return {f"heldout_loss_{kind}": sums[kind] / max(1, targets[kind]) for kind in sums}

    def caption(self) -> Captioned:
        """Caption the held-out pictures greedily; a collective over all ranks, the same on each.

        The whole prefix runs through the pipeline for every token: for a handful of pictures, not for a benchmark.
        """
        generated: list[str] = []
        size = self.run.training.micro_batch_size
        for first in range(0, self.num_pictures, size):
            num_images = min(size, self.num_pictures - first)
            generated += self._caption_microbatch(self.pictures[first : first + num_images], num_images)
        return Captioned(self.pictures, self.captions, generated)

    def _caption_microbatch(self, images: Tensor, num_images: int) -> list[str]:
        tokenizer, rows = self.tokenizer, self.run.training.micro_batch_size
        prefix = [tokenizer.bos_id, tokenizer.image_id]
        first_slot = len(prefix)
        prefix += [tokenizer.pad_id] * self.images.num_latents + [tokenizer.end_of_image_id]
        prefix += tokenizer.encode(self.run.evaluation.caption_prompt)
        length = self.run.data.sequence_length
        num_tokens = min(self.run.evaluation.caption_tokens, length - len(prefix))
        ids_BT = torch.full((rows, length), tokenizer.pad_id)
        ids_BT[:, : len(prefix)] = torch.tensor(prefix)
        positions = torch.tensor([(row, first_slot) for row in range(num_images)])
        for column in range(len(prefix), len(prefix) + num_tokens):
            batch = MultimodalBatch.of_prompts(ids_BT, images, positions)
            ids_BT[:, column] = self.runner.likeliest_tokens(batch, column - 1)
        answers = ids_BT[:num_images, len(prefix) : len(prefix) + num_tokens].tolist()
        return [tokenizer.decode(_until(answer, tokenizer.eos_id)) for answer in answers]

    def _read_pictures(self) -> tuple[int, Tensor, list[str]]:
        """Return how many pictures are captioned, the pictures [I, 3, S, S], and what the corpora say of them.

        Tensor rank 0 of stage 0 reads: broadcast of the pictures over its tensor group, of their number to all stages.
        """
        topology, count, size = self.runner.topology, self.run.evaluation.captions, self.images.size
        corpora = [corpus for corpus in self.run.data.heldout if corpus.kind == "caption"]
        reads = topology.is_first_stage and topology.tp_rank == 0
        with failing_together(topology):
            check_heldout(self.run.data, self.images, self.plan_folder)
            pairs = [
                pair
                for corpus in corpora
                if reads
                for pair in heldout_captions(self.run.data, corpus, count, self.plan_folder)
            ][:count]
        number = torch.tensor(len(pairs), device=topology.device)
        dist.broadcast(number, group=topology.tp_group, group_src=0)
        dist.broadcast(number, group=topology.pp_group, group_src=0)
        if not topology.is_first_stage or not number:
            return int(number), torch.zeros(0, 3, size, size), []
        pictures = torch.empty(int(number), 3, size, size, device=topology.device)
        if reads:
            pictures.copy_(torch.stack([load_image(picture, size) for picture, _ in pairs]))
        dist.broadcast(pictures, group=topology.tp_group, group_src=0)
        return int(number), pictures.cpu(), [text for _, text in pairs]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
