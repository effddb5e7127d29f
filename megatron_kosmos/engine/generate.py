"""Text from prompts and pictures, in batches with little padding: greedy, by beam search, or drawn with a seed.

from megatron_kosmos.engine.generate import Decoding, Generator, Sampling

generator = Generator.load("exported")
(caption,) = generator.generate(["An image of"], [["photo.jpg"]], Decoding(num_beams=5))
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from megatron_kosmos.checkpoint.manifest import is_of_training
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.images.decoding import decode_image
from megatron_kosmos.engine.sampling import GenerationError, Sampling
from megatron_kosmos.hf import KosmosProcessor
from megatron_kosmos.hf.export_folder import MAX_NEW_TOKENS
from megatron_kosmos.hf.folder_weights import FolderError
from megatron_kosmos.hf.load_export import load_export

Picture = Image.Image | Path | str
"""A decoded picture, or the path of one that is read when its batch comes."""
WINDOW = 8
"""Batches whose prompts are sorted by length together: their answers wait for each other to come in order."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. The default is greedy search; the paper captions with 5 beams.

    Raises GenerationError for values that mean nothing, alone or together.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    """Longest answer; `</s>` ends it earlier."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability over its length to this power: above 0 favours long answers."""
    sampling: Sampling | None = None
    """Draw tokens instead, each prompt with random numbers of its own."""
    use_cache: bool = True
    """Keep keys and values; without them every token costs a pass over all before it, for the same text."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise GenerationError(f"{name}={getattr(self, name)} is below 1")
        if self.num_beams > 1 and self.sampling is not None:
            raise GenerationError(f"num_beams={self.num_beams} searches and does not draw: leave out beams or sampling")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise GenerationError(f"length_penalty={self.length_penalty} weighs beams: it needs num_beams above 1")


@dataclass(frozen=True)
class Request:
    """A prompt with its pictures; `<image>` in it says where they go, else they stand before it."""

    prompt: str
    images: Sequence[Picture] = ()


class CausalModel(Protocol):
    """What a generator asks of a model: to run and generate as `KosmosForConditionalGeneration` does."""

    config: Any
    """Has `max_position_embeddings`."""
    device: Any

    def eval(self) -> Any:
        """Turn dropout off."""

    def generate(self, **inputs: Any) -> Any:
        """Return the prompts' ids and the new ones [B, T], as transformers' GenerationMixin."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return what has `logits` [B, T, V]."""


class Generator:
    """A model with its processor, which writes what follows a prompt.

    Attributes: `model`; `processor`, from prompts and pictures to the model's inputs; `max_batch_size`, prompts in a
    batch at most: memory grows with it and with the number of beams, the text does not change.
    """

    def __init__(self, model: CausalModel, processor: KosmosProcessor, max_batch_size: int = 32) -> None:
        """Raises GenerationError for a batch size below 1."""
        if max_batch_size < 1:
            raise GenerationError(f"max_batch_size={max_batch_size} is below 1")
        model.eval()
        self.model, self.processor, self.max_batch_size = model, processor, max_batch_size

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | None = None, max_batch_size: int = 32) -> Self:
        """Load what `kosmos convert to-hf` wrote; no code of the folder runs. CUDA where there is some, by default.

        A run of `kosmos train`, or one of its checkpoints, goes to `load_trained`. Raises GenerationError when the
        folder is none of these, or not whole.
        """
        folder = Path(folder)
        if is_of_training(folder):
            if device is not None:
                raise GenerationError(
                    f"{folder} is of training and runs on the process's current device; leave out device"
                )
            return cls.load_trained(folder, max_batch_size)
        try:
            model, processor = load_export(folder)
        except FolderError as error:
            raise GenerationError(str(error)) from error
        there = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(there), processor, max_batch_size)

    @classmethod
    def load_trained(cls, source: Path | str, max_batch_size: int = 32, tokenizer: Path | None = None) -> Self:
        """Load a run's newest checkpoint, or one checkpoint, on all ranks of the running process group, or on this one.

        See `parallel_generation.load_trained`: from then on every rank makes the same calls.
        """
        from megatron_kosmos.engine.parallel_generation import (
            load_trained,
        )  # brings megatron-core, which takes its time

        return cls(*load_trained(Path(source), tokenizer), max_batch_size)

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Picture]] | None = None,
        decoding: Decoding = Decoding(),
    ) -> list[str]:
        """Return what follows each prompt, in their order.

        `images` lists each prompt's pictures; None: no prompt has any. Raises GenerationError, naming the first prompt
        that is met with something wrong: pictures that do not match its `<image>` or do not decode, or no room for the
        answer.
        """
        rows = [()] * len(prompts) if images is None else images
        if len(rows) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts need as many lists of images, not {len(rows)}")
        requests = {number: Request(*both) for number, both in enumerate(zip(prompts, rows, strict=True))}
        texts: dict[int, str] = {}
        for number, answer in self.answers(requests, decoding):
            if isinstance(answer, GenerationError):
                raise GenerationError(f"prompt {number}: {answer}") if len(prompts) > 1 else answer
            texts[number] = answer
        return [texts[number] for number in requests]

    def stream(
        self,
        request: Request,
        show: Callable[[str], object],
        decoding: Decoding = Decoding(),
    ) -> str:
        """Return what `generate` does for one prompt, and call `show` with each piece of it as soon as it is known.

        Raises GenerationError as `generate` does, and for beams, which know their text at the end only.
        """
        if decoding.num_beams > 1:
            raise GenerationError(f"num_beams={decoding.num_beams} knows its text at the end only; stream with 1 beam")
        self._check_length(request, decoding)
        pictures = [_decoded(picture) for picture in request.images]
        shown = _Shown(lambda ids: self.processor.batch_decode([ids])[0], show)
        (text,) = self._write([0], [request.prompt], [pictures], decoding, shown)
        return text

    def answers(
        self, requests: Mapping[int, Request], decoding: Decoding
    ) -> Iterator[tuple[int, str | GenerationError]]:
        """Yield each request's number with its text, or with what is wrong with it, as soon as it is made.

        Not in the order of `requests`: prompts of like length make a batch. A number is also what its request draws by.
        """
        numbers, window = list(requests), WINDOW * self.max_batch_size
        for first in range(0, len(numbers), window):
            lengths: dict[int, int] = {}
            for number in numbers[first : first + window]:
                try:
                    lengths[number] = self._check_length(requests[number], decoding)
                except GenerationError as error:
                    yield number, error
            for batch in batches_of_like_length(lengths, self.max_batch_size):
                yield from self._answer_batch({number: requests[number] for number in batch}, decoding)

    def _check_length(self, request: Request, decoding: Decoding) -> int:
        """Return the tokens of a prompt with its pictures. Raises GenerationError when there is no room for more."""
        num_images = len(request.images)
        try:
            num_tokens = self.processor.num_tokens(request.prompt, num_images)
        except ValueError as error:
            raise GenerationError(str(error)) from error
        longest: int = self.model.config.max_position_embeddings
        if num_tokens + decoding.max_new_tokens > longest:
            raise GenerationError(
                f"{num_tokens} tokens, {num_images} x {self.processor.num_image_tokens} of pictures among them, and "
                f"{decoding.max_new_tokens} new ones are more than the {longest} of the model; shorten the prompt, "
                f"give fewer pictures or lower max_new_tokens"
            )
        return num_tokens

    def _answer_batch(
        self, requests: Mapping[int, Request], decoding: Decoding
    ) -> Iterator[tuple[int, str | GenerationError]]:
        pictures: dict[int, list[Image.Image]] = {}
        for number, request in requests.items():
            try:
                pictures[number] = [_decoded(picture) for picture in request.images]
            except GenerationError as error:
                yield number, error
        if pictures:
            prompts = [requests[number].prompt for number in pictures]
            texts = self._write(list(pictures), prompts, list(pictures.values()), decoding)
            yield from zip(pictures, texts, strict=True)

    def _write(
        self,
        numbers: Sequence[int],
        prompts: list[str],
        pictures: list[list[Image.Image]],
        decoding: Decoding,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """Return the texts of one batch; `numbers` are what its rows draw by."""
        inputs = self.processor(text=prompts, images=pictures, return_tensors="pt").to(self.model.device)
        options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "use_cache": decoding.use_cache}
        options |= {"num_beams": decoding.num_beams, "do_sample": False, "streamer": streamer}
        if decoding.num_beams > 1:
            options["length_penalty"] = decoding.length_penalty
        if decoding.sampling is not None:
            options["logits_processor"] = decoding.sampling.processors(numbers)
        tokens: Tensor = self.model.generate(**inputs, **options)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])


class _Shown(BaseStreamer):
    """Calls `show` with what each new token adds to the text.

    Unlike transformers' TextStreamer it decodes all tokens every time, so the pieces join to the text to the letter.
    """

    def __init__(self, decode: Callable[[list[int]], str], show: Callable[[str], object]) -> None:
        self.decode, self.show = decode, show
        self.ids: list[int] | None = None
        self.length_shown = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then each new token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.decode(self.ids)
        # The bytes of a character may be several tokens; until the last of them is there, it decodes to this.
        self._show(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Show what was held back."""
        self._show(self.decode(self.ids or []))

    def _show(self, text: str) -> None:
        if len(text) > self.length_shown:
            self.show(text[self.length_shown :])
            self.length_shown = len(text)


def batches_of_like_length(lengths: Mapping[int, int], size: int) -> list[list[int]]:
    """Return the keys in batches of neighbours by length, the batch with the first of the keys first."""
    place = {number: place for place, number in enumerate(lengths)}
    by_length = sorted(lengths, key=lambda number: lengths[number])
    batches = [by_length[first : first + size] for first in range(0, len(by_length), size)]
    return sorted(batches, key=lambda batch: min(place[number] for number in batch))


def read_picture(path: Path) -> Image.Image:
    """Return the decoded picture at `path`. Raises GenerationError when there is none or it does not decode."""
    if not path.is_file():
        raise GenerationError(f"{path}: there is no such file")  # a pipe or a device might never end
    try:
        return decode_image(path.read_bytes())
    except DataError as error:
        raise GenerationError(f"{path}: {error}") from error
    except OSError as error:
        raise GenerationError(f"{path}: {error.strerror}") from error


def _decoded(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else read_picture(Path(picture))


__all__ = ["Decoding", "GenerationError", "Generator", "Request", "Sampling", "batches_of_like_length", "read_picture"]
