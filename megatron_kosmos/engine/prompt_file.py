"""A file of prompts, one JSON object a line, and its answers, one JSON object a line in the same order."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.engine.generate import Decoding, GenerationError, Generator, Request

Record = dict[str, Any]
"""`line`, counted from 1, `id` where there is one, and `text` or `error`."""


class PromptLine(StrictModel):
    """What a line may hold."""

    prompt: str
    images: tuple[Path, ...] = ()
    """Relative to the folder of the file."""
    id: str | int | None = None
    """Comes back with the answer."""


@dataclass(frozen=True)
class PromptFile:
    """The lines of a file of prompts by number, counted from 1; those without anything are left out."""

    path: Path
    prompts: dict[int, PromptLine]
    errors: dict[int, str]
    """What is wrong with the other lines."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check `path`. Raises GenerationError where it cannot be read or has no lines."""
        if not path.is_file():
            raise GenerationError(f"there is no file {path}")
        prompts: dict[int, PromptLine] = {}
        errors: dict[int, str] = {}
        for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if line.strip():
                try:
                    prompts[number] = _checked(line, path.parent)
                except GenerationError as error:
                    errors[number] = str(error)
        if not prompts and not errors:
            raise GenerationError(f'{path} has no prompts; each line is an object such as {{"prompt": "An image of"}}')
        return cls(path, prompts, errors)

    def __len__(self) -> int:
        return len(self.prompts) + len(self.errors)

    def request(self, number: int) -> Request:
        """Return the request of line `number`, with the paths of its pictures."""
        line = self.prompts[number]
        return Request(line.prompt, [self.path.parent / image for image in line.images])

    def answers(
        self, generator: Generator, decoding: Decoding, strict: bool, tell: Callable[[], object]
    ) -> Iterator[Record]:
        """Yield a record for each line, in order, as soon as those before it are there; `tell` hears of each one made.

        The prompt of line n draws as number n - 1. Raises GenerationError with file and line for the first thing that
        is wrong if `strict`: for lines before anything is generated, for a picture that does not decode or a prompt
        that is too long when it is met.
        """
        if strict and self.errors:
            raise GenerationError(
                "\n".join(f"{self.path}, line {number}: {what}" for number, what in self.errors.items())
            )
        waiting = deque(sorted([*self.prompts, *self.errors]))
        made: dict[int, Record] = {}
        for number, error in self.errors.items():
            made[number] = {"line": number, "error": error}
            tell()
        requests = {number - 1: self.request(number) for number in self.prompts}
        for index, answer in generator.answers(requests, decoding):
            number = index + 1
            if strict and isinstance(answer, GenerationError):
                raise GenerationError(f"{self.path}, line {number}: {answer}") from answer
            made[number] = self._record(number, answer)
            tell()
            while waiting and waiting[0] in made:
                yield made.pop(waiting.popleft())
        yield from (made.pop(number) for number in waiting)

    def _record(self, number: int, answer: str | GenerationError) -> Record:
        record: Record = {"line": number}
        if (given := self.prompts[number].id) is not None:
            record["id"] = given
        return record | ({"text": answer} if isinstance(answer, str) else {"error": str(answer)})


def _checked(line: bytes, folder: Path) -> PromptLine:
    try:
        read = PromptLine.model_validate_json(line.strip(), strict=True)
    except ValidationError as error:
        raise GenerationError("; ".join(_said(one) for one in error.errors())) from error
    for image in read.images:
        if not (folder / image).is_file():
            raise GenerationError(f"there is no picture {folder / image}")
    return read


def _said(error: Any) -> str:
    """Return one thing that pydantic found, with its place in the line."""
    place = ".".join(map(str, error["loc"]))
    message = error["msg"].replace(" at line 1 column ", " at column ")  # of this line, whatever its number in the file
    if error["type"] == "extra_forbidden":
        return f"{place} is no field; there are {', '.join(PromptLine.model_fields)}"
    return f"{place}: {message}" if place else message


__all__ = ["PromptFile", "PromptLine", "Record"]
