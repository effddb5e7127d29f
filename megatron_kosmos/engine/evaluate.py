"""Measuring an exported model on held-out data: loss by corpus, captions, and the choice among captions.

Shape letters: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CorpusConfig, RunConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, heldout_batches, heldout_captions
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.generate import Decoding, Generator
from megatron_kosmos.prompt import SourceKind

Picture = Image.Image
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where no held-out corpus of that kind is configured."""

    loss: dict[SourceKind, float]
    """Nats a target token by kind of corpus."""
    unigram_text_loss: float | None
    """Nats a target of the held-out text under the training text's token frequencies: the loss without any context."""
    caption_exact_match: float | None
    """Share of pictures whose greedy caption is the corpus' to the letter."""
    caption_exact_match_shuffled: float | None
    """The same with the pictures dealt out at random: what a model that doesn't look would get."""
    ranked_choice: float | None
    """Share of pictures for which the right caption is the likeliest among all captions of the corpus."""
    pictures: int
    """Pictures that captions were measured on."""

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return asdict(self)


class Evaluator:
    """Evaluates one exported model on the held-out corpora of a run's configuration."""

    def __init__(self, generator: Generator, run: RunConfig, seed: int = 0) -> None:
        """`seed` deals out the pictures of the shuffled control."""
        self.generator, self.run, self.seed = generator, run, seed
        self.images = ImageFormat(run.model.resampler.num_latents, run.model.vision.image_size)

    def evaluate(self, max_pictures: int, max_sequences: int, tell: Progress) -> Evaluation:
        """Measure everything, on at most so many pictures and sequences of each corpus.

        Raises DataError for corpora that don't open or decode.
        """
        heldout = self.run.data.heldout
        losses: dict[SourceKind, float] = {}
        for kind in dict.fromkeys(corpus.kind for corpus in heldout):
            tell(f"loss of {kind}")
            losses[kind] = self.loss([corpus for corpus in heldout if corpus.kind == kind], max_sequences)
        pairs = [
            pair
            for corpus in heldout
            if corpus.kind == "caption"
            for pair in heldout_captions(self.run.data, corpus, max_pictures)
        ][:max_pictures]
        exact = shuffled = ranked = None
        if pairs:
            pictures, captions = [picture for picture, _ in pairs], [caption for _, caption in pairs]
            tell(f"captions of {len(pairs)} pictures")
            exact = self.exact_match(pictures, captions)
            order = np.random.default_rng(self.seed).permutation(len(pictures))
            tell("captions of shuffled pictures")
            shuffled = self.exact_match([pictures[index] for index in order], captions)
            tell("choice among captions")
            ranked = self.ranked_choice(pictures, captions)
        has_text = any(corpus.kind == "text" for corpus in heldout)
        unigram = unigram_loss(self.run, max_sequences) if has_text else None
        return Evaluation(losses, unigram, exact, shuffled, ranked, len(pairs))

    def loss(self, corpora: Sequence[CorpusConfig], max_sequences: int) -> float:
        """Return the mean loss of the target tokens of packed sequences, as in training, without dropout."""
        total, count = 0.0, 0
        for corpus in corpora:
            for batch in _batches(self.run, corpus, self.images, max_sequences):
                losses_BT = self._token_losses(batch)
                total += float(losses_BT[batch.loss_mask].double().sum())
                count += batch.num_target_tokens
        return total / max(1, count)

    def exact_match(self, pictures: Sequence[Picture], captions: Sequence[str]) -> float:
        """Return the share of `pictures` whose greedy caption equals its place's in `captions`."""
        settings = self.run.evaluation
        answers = self.generator.generate(
            [settings.caption_prompt] * len(pictures),
            [[picture] for picture in pictures],
            Decoding(max_new_tokens=settings.caption_tokens),
        )
        return _mean(answer.strip() == caption for answer, caption in zip(answers, captions, strict=True))

    def ranked_choice(self, pictures: Sequence[Picture], captions: Sequence[str]) -> float:
        """Return the share of `pictures` for which its caption has the highest probability of all distinct captions."""
        choices = sorted(set(captions))
        scores = torch.stack([self._log_probability(pictures, choice) for choice in choices], dim=1)
        best = scores.argmax(1).tolist()
        return _mean(choices[index] == caption for index, caption in zip(best, captions, strict=True))

    @torch.no_grad()
    def _log_probability(self, pictures: Sequence[Picture], caption: str) -> Tensor:
        """Return the log probability [pictures] of `caption` and `</s>` after each picture and the prompt."""
        model, processor = self.generator.model, self.generator.processor
        prompt = self.run.evaluation.caption_prompt
        scores = []
        for start in range(0, len(pictures), self.generator.max_batch_size):
            chunk = [[picture] for picture in pictures[start : start + self.generator.max_batch_size]]
            given = processor(text=[prompt] * len(chunk), images=chunk, return_tensors="pt")["input_ids"].shape[1]
            whole = f"{prompt} {caption}".strip()  # A caption begins with a new word, as it does when it is generated.
            inputs = processor(text=[whole] * len(chunk), images=chunk, add_eos_token=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            ids_BT = inputs["input_ids"]
            log_probabilities = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
            targets = ids_BT[:, given:].unsqueeze(-1)
            scores.append(log_probabilities[:, given - 1 : -1].gather(-1, targets).squeeze(-1).sum(1).cpu())
        return torch.cat(scores)

    @torch.no_grad()
    def _token_losses(self, batch: MultimodalBatch) -> Tensor:
        """Return the cross-entropy [B, T] of every position, in nats."""
        model = self.generator.model
        batch_there = batch.to(model.device)
        logits_BTV = model(
            batch_there.input_ids,
            pixel_values=batch_there.images if len(batch.images) else None,
            image_embeds_position_mask=batch_there.slots(self.images.num_latents),
            use_cache=False,
        ).logits
        return F.cross_entropy(logits_BTV.float().transpose(1, 2), batch_there.labels, reduction="none").cpu()


def unigram_loss(run: RunConfig, max_sequences: int) -> float:
    """Return the loss of the held-out text's targets under the training text's token frequencies, plus one each."""
    tokenizer = KosmosTokenizer.load(run.data.tokenizer)
    counts = np.ones(tokenizer.vocab_size)
    for corpus in run.data.train:
        if corpus.kind == "text":
            opened = Corpus(corpus, tokenizer)
            for document in range(len(opened)):
                counts += np.bincount(opened.tokens(document)[1:], minlength=len(counts))
    log_frequencies = torch.from_numpy(np.log(counts) - math.log(counts.sum()))
    images = ImageFormat(run.model.resampler.num_latents, run.model.vision.image_size)
    targets = [
        batch.labels[batch.loss_mask]
        for corpus in run.data.heldout
        if corpus.kind == "text"
        for batch in _batches(run, corpus, images, max_sequences)
    ]
    return -float(log_frequencies[torch.cat(targets)].mean())


def _batches(
    run: RunConfig, corpus: CorpusConfig, images: ImageFormat, max_sequences: int
) -> Iterator[MultimodalBatch]:
    size = run.training.micro_batch_size
    for microbatches in heldout_batches(run.data, corpus, images, BatchGeometry(size, size), max_sequences):
        yield from microbatches


def _mean(claims: Iterator[bool] | Sequence[bool]) -> float:
    values = list(claims)
    return sum(values) / len(values)
