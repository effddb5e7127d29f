"""Does an export generate the same tokens however it is asked? Checks it and writes results/generation.json.

    .venv/bin/python benchmarks/generation.py --model runs/quickstart/hf --images runs/quickstart/raw/images

Prompts with 0 to 4 pictures each: greedy, with 5 beams and drawn with a seed; with a cache and without; one by one and
in batches. For greedy search also how near the likeliest token and the next one came, and how far rounding moved a
logit: where the first is not above twice the second, a tie may fall either way.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_kosmos.engine.generate import Generator, Sampling, batches_of_like_length, read_picture

RESULTS = Path(__file__).parent / "results" / "generation.json"
MOST_IMAGES = 4
SEARCHES = ("greedy", "5 beams", "drawn")
TEXTS = (
    "",
    "An image of",
    'The "break" statement terminates the nearest enclosing loop, and',
    "a handwritten",
    "Note that a class definition is",
    "These pictures show",
    "The following sections describe the standard types",
    "If the object is",
    "Question: what is it? Answer:",
    "A module is a file; its name is",
)
Prompt = tuple[str, list[Image.Image]]


class Answer(NamedTuple):
    """What came of a prompt."""

    tokens: list[int]
    """New ones, up to `</s>`."""
    scores: Tensor | None
    """[new tokens, vocabulary] logits, of greedy search only."""


def main(
    model: Annotated[Path, typer.Option(help="Folder that `kosmos convert to-hf` wrote.")],
    images: Annotated[Path, typer.Option(help="Folder of pictures.")],
    prompts: Annotated[int, typer.Option(help="How many.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Prompts in a batch.")] = 16,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS,
) -> None:
    """Generate in every way, print a table and write it; ends with 1 if a token differs."""
    rows = compare(Generator.load(model), make_prompts(images, prompts), max_new_tokens, batch_size)
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": machine, "prompts": prompts, "generation": rows}, indent=2) + "\n")
    if any(row["same_answers"] < prompts for row in rows):
        raise typer.Exit(1)


def make_prompts(folder: Path, number: int) -> list[Prompt]:
    """Return prompts with 0, 1, 2, 3, 4, 0, … pictures, before the text or amid it, and texts of many lengths."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise typer.BadParameter(f"{folder} has no .png and no .jpg")
    asked: list[Prompt] = []
    for index in range(number):
        count = index % (MOST_IMAGES + 1)
        pictures = [read_picture(paths[(7 * index + place) % len(paths)]) for place in range(count)]
        text = TEXTS[index // (MOST_IMAGES + 1) % len(TEXTS)]
        if index % 2 and count:
            text = " and the next is ".join(["<image> a handwritten seven,"] * (count - 1) + ["<image>"])
            text = f"Here are {count} pictures. The first is {text}"
        asked.append((text, pictures))
    return asked


def compare(
    generator: Generator, asked: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """Return a row for each way: how many answers are, token by token, those with a cache and one by one."""
    rows = []
    for search in SEARCHES:
        expected: list[Answer] = []
        for use_cache, size in ((True, 1), (False, 1), (True, batch_size), (False, batch_size)):
            started = time.process_time()
            answers = answer(generator, asked, size, search, {"use_cache": use_cache, "max_new_tokens": max_new_tokens})
            seconds = time.process_time() - started
            expected = expected or answers
            same = [one.tokens == other.tokens for one, other in zip(answers, expected, strict=True)]
            row = {"search": search, "cache": use_cache, "batch": size, "same_answers": sum(same), "cpu_s": seconds}
            row |= {"tokens": sum(len(one.tokens) for one in answers)}
            row |= {"different_answers": len({tuple(one.tokens) for one in answers})}
            rows.append(row | margins(answers, expected))
    return rows


def answer(
    generator: Generator, asked: Sequence[Prompt], size: int, search: str, options: dict[str, Any]
) -> list[Answer]:
    """Return the answers in the order of the prompts, made in batches of `size`."""
    processor, count = generator.processor, generator.processor.num_tokens
    lengths = {place: count(text, len(pictures)) for place, (text, pictures) in enumerate(asked)}
    answers: dict[int, Answer] = {}
    for batch in batches_of_like_length(lengths, size):
        texts, pictures = zip(*(asked[place] for place in batch), strict=True)
        inputs = processor(text=list(texts), images=list(pictures), return_tensors="pt").to(generator.model.device)
        how = options | {"num_beams": 5 if search == "5 beams" else 1, "do_sample": False}
        how |= {"return_dict_in_generate": True, "output_scores": search == "greedy"}
        if search == "drawn":
            how["logits_processor"] = Sampling(temperature=1.2, top_p=0.95).processors(batch)
        made = generator.model.generate(**inputs, **how)
        for row, place in enumerate(batch):
            new = made.sequences[row, inputs["input_ids"].shape[1] :].tolist()
            end = processor.tokenizer.eos_token_id
            tokens = new[: new.index(end) + 1] if end in new else new
            scores = torch.stack([step[row] for step in made.scores[: len(tokens)]]) if search == "greedy" else None
            answers[place] = Answer(tokens, scores)
    return [answers[place] for place in range(len(asked))]


def margins(answers: Sequence[Answer], expected: Sequence[Answer]) -> dict[str, float | None]:
    """Return the least distance of the two likeliest tokens, and the most that a logit of the same text moved."""
    least, moved = float("inf"), 0.0
    for one, other in zip(answers, expected, strict=True):
        if one.scores is None or other.scores is None:
            return {"least_margin": None, "logits_moved": None}
        first, second = one.scores.topk(2, dim=-1).values.unbind(-1)
        least = min(least, float((first - second).min()))
        if one.tokens == other.tokens:
            is_allowed = other.scores.isfinite()
            moved = max(moved, float((one.scores - other.scores)[is_allowed].abs().max()))
    return {"least_margin": least, "logits_moved": moved}


if __name__ == "__main__":
    typer.run(main)
