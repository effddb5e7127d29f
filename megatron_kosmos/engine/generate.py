"""Text from prompts and pictures, by an exported model."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.decoding import decode_image
from megatron_kosmos.hf import KosmosForConditionalGeneration, KosmosImageProcessor, KosmosProcessor
from megatron_kosmos.hf.load_tokenizer import exported_tokenizer


class GenerationError(ValueError):
    """A model or input that nothing can be generated with; the message says what to do."""


def read_picture(path: Path) -> Image.Image:
    """Return the decoded picture at `path`. Raises GenerationError when there is none or it does not decode."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, DataError) as error:
        raise GenerationError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens instead of taking the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this."""
    seed: int = 0


class Generator:
    """An exported model with its processor."""

    def __init__(
        self, model: KosmosForConditionalGeneration, processor: KosmosProcessor, max_batch_size: int = 32
    ) -> None:
        self.model, self.processor, self.max_batch_size = model.eval(), processor, max_batch_size

    @classmethod
    def load(cls, folder: Path, device: torch.device | None = None) -> Self:
        """Load what `kosmos convert to-hf` wrote; no code of the folder runs. CUDA where there is some, by default.

        Raises GenerationError when the folder is no exported model.
        """
        if not (folder / "config.json").is_file():
            raise GenerationError(
                f"{folder} is no exported model; make one with `kosmos convert to-hf RUN_OR_CHECKPOINT {folder}`"
            )
        model = KosmosForConditionalGeneration.from_pretrained(folder, dtype="auto")
        processor = KosmosProcessor(
            KosmosImageProcessor.from_pretrained(folder),
            exported_tokenizer(folder),
            model.config.num_image_tokens,
        )
        return cls(model.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu")), processor)

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        max_new_tokens: int,
        num_beams: int = 1,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Return what follows each prompt, up to `</s>` or `max_new_tokens`.

        `images` lists each prompt's pictures; `<image>` in a prompt says where they go, else they stand before it.
        Greedy or beam search, or sampling. Raises ValueError when pictures and prompts do not match.
        """
        if len(images) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts need as many lists of images, not {len(images)}")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        if sampling is not None:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        texts: list[str] = []
        with nullcontext() if sampling is None else torch.random.fork_rng():
            if sampling is not None:
                torch.manual_seed(sampling.seed)
            for start in range(0, len(prompts), self.max_batch_size):
                chunk = slice(start, start + self.max_batch_size)
                texts += self._generate_batch(list(prompts[chunk]), [list(row) for row in images[chunk]], options)
        return texts

    def _generate_batch(
        self, prompts: list[str], images: list[list[Image.Image]], options: dict[str, Any]
    ) -> list[str]:
        inputs = self.processor(text=prompts, images=images, return_tensors="pt").to(self.model.device)
        tokens = self.model.generate(**inputs, **options)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
