"""Drawing tokens with random numbers that belong to a prompt, so that its text does not depend on its batch.

Shape letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class GenerationError(ValueError):
    """A model, an input or a setting that nothing can be generated with; the message says what to do."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens instead of taking the likeliest. Raises GenerationError for values that mean nothing."""

    temperature: float = 1.0
    """Divides the logits: below 1 is safer, above is wilder."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens, before `top_p` counts; 0: from all."""
    seed: int = 0
    """Prompt number n of a call, counted from 0, draws with seed + n."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise GenerationError(
                f"temperature={self.temperature} is not above 0; leave sampling out for greedy search"
            )
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p={self.top_p} is no share of probability; it is above 0 and at most 1")
        if self.top_k < 0:
            raise GenerationError(f"top_k={self.top_k} is below 0; 0 draws from all tokens")
        if not 0 <= self.seed < 2**62:
            raise GenerationError(f"seed={self.seed} is out of range; it is at least 0 and below 2^62")

    def processors(self, numbers: Sequence[int]) -> LogitsProcessorList:
        """Return what makes greedy search draw, for a batch of the prompts with these numbers."""
        processors = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(GumbelNoise([self.seed + number for number in numbers]))
        return processors


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits [B, V]: the largest of a row is then a draw from its softmax (arXiv 1411.0030).

    A draw changes with the logits' last digits only where two sums all but tie; inverting the cumulated probabilities
    would add up their rounding.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """`seeds`: one a row."""
        self.seeds, self._generators = seeds, list[torch.Generator]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the noisy logits [B, V]; `input_ids` [B, T] do not matter."""
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        exponential = torch.empty_like(scores)
        for row, generator in zip(exponential, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential.clamp_(min=torch.finfo(scores.dtype).tiny).log_()


__all__ = ["GenerationError", "GumbelNoise", "Sampling"]
