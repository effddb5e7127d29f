"""Files of prompts: their answers in order, pictures beside the file, and bad lines."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kosmos.engine.generate import Decoding, GenerationError, Generator, Sampling
from megatron_kosmos.engine.prompt_file import PromptFile
from tests.unit.engine.exported import exported_folder, picture

DECODING = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = exported_folder(tmp_path_factory.mktemp("export"))
    return Generator.load(folder, torch.device("cpu"), max_batch_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "text.png").write_text("no picture")
    return tmp_path


def write(folder: Path, *lines: dict[str, Any] | str) -> PromptFile:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return PromptFile.read(path)


def answers(
    generator: Generator, lines: PromptFile, strict: bool = False, tell: Callable[[], object] = lambda: None
) -> Iterator[dict[str, Any]]:
    return lines.answers(generator, DECODING, strict, tell)


GOOD: tuple[dict[str, Any], ...] = (
    {"prompt": "a long line of words and numbers, seven of them, and a picture <image>", "images": ["pictures/0.png"]},
    {"prompt": "An image of", "images": ["pictures/1.png", "pictures/2.png"], "id": "two"},
    {"prompt": "seven", "id": 7},
    {"prompt": "Words and numbers, words and numbers"},
    {"prompt": ""},
)


def test_answers_come_in_order_and_are_those_of_each_prompt_alone(generator: Generator, folder: Path) -> None:
    told: list[int] = []
    records = list(answers(generator, write(folder, *GOOD), tell=lambda: told.append(1)))
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5]
    assert [record.get("id") for record in records] == [None, "two", 7, None, None]
    for record, line in zip(records, GOOD, strict=True):
        images = [folder / name for name in line.get("images", ())]
        assert record["text"] == generator.generate([line["prompt"]], [images], DECODING)[0]
    assert len(told) == 5


def test_an_answer_is_given_before_the_next_batch_is_made(generator: Generator, folder: Path) -> None:
    told: list[int] = []
    lines = write(folder, *({"prompt": "seven " * (1 + number)} for number in range(40)))
    next(answers(generator, lines, tell=lambda: told.append(1)))
    assert len(told) == 1


BAD = {
    2: ('{"prompt": "An image of"', "EOF while parsing an object at column 24"),
    3: ('{"text": "An image of"}', "prompt: Field required; text is no field; there are prompt, images, id"),
    4: ('{"prompt": 3}', "prompt: Input should be a valid string"),
    6: ('["An image of"]', "Input should be an object"),
    7: ('{"prompt": "a", "images": "pictures/0.png"}', "images: Input should be a valid array"),
    8: ('{"prompt": "a", "images": ["pictures/9.png"]}', "there is no picture"),
    9: ("[" * 10_000, "recursion limit exceeded"),
    10: ('{"prompt": "a", "images": ["pictures"]}', "there is no picture"),
    11: ('{"prompt": "a", "id": 1.5}', "id"),
}
LATE = {
    12: ('{"prompt": "<image> and <image>", "images": ["pictures/0.png"], "id": "late"}', "2 <image> for 1 image(s)"),
    13: ('{"prompt": "a", "images": ["pictures/text.png"]}', "text.png: no picture in these"),
    14: (json.dumps({"prompt": "word " * 500}), "are more than the 300 of the model"),
}


def test_a_bad_line_has_an_error_in_place_of_a_text_and_the_others_go_on(generator: Generator, folder: Path) -> None:
    lines = ['{"prompt": "seven"}'] + [""] * 14
    for number, (line, _) in (BAD | LATE).items():
        lines[number - 1] = line
    lines[14] = '{"prompt": "An image of", "images": ["pictures/1.png"]}'
    records = {record["line"]: record for record in answers(generator, write(folder, *lines))}
    assert list(records) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert records[1]["text"] == generator.generate(["seven"], decoding=DECODING)[0]
    assert records[15]["text"] == generator.generate(["An image of"], [[picture(1)]], DECODING)[0]
    for number, (_, message) in (BAD | LATE).items():
        assert message in records[number]["error"]
        assert "text" not in records[number]
    assert records[12]["id"] == "late"


@pytest.mark.parametrize("number", [2, 8, *LATE])
def test_strict_names_file_and_line(generator: Generator, folder: Path, number: int) -> None:
    line, _ = (BAD | LATE)[number]
    lines = write(folder, *['{"prompt": "seven"}'] * 4, line)
    with pytest.raises(GenerationError, match=r"prompts.jsonl, line 5: "):
        list(answers(generator, lines, strict=True))


def test_what_a_line_draws_does_not_hang_on_the_other_lines(generator: Generator, folder: Path) -> None:
    decoding = Decoding(8, sampling=Sampling(temperature=2.0, seed=3))
    options: dict[str, Any] = {"strict": False, "tell": lambda: None}
    all_good = list(write(folder, *GOOD).answers(generator, decoding, **options))
    one_bad = list(write(folder, "{", *GOOD[1:]).answers(generator, decoding, **options))
    assert one_bad[1:] == all_good[1:]
    alone = Decoding(8, sampling=Sampling(temperature=2.0, seed=3 + 2))
    assert generator.generate(["seven"], decoding=alone) == [all_good[2]["text"]]


def test_a_file_may_come_from_windows(generator: Generator, folder: Path) -> None:
    path = folder / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "seven"}\r\n\r\n{"prompt": "\xff"}\r\n')
    first, second = answers(generator, PromptFile.read(path))
    assert first["text"] == generator.generate(["seven"], decoding=DECODING)[0]
    assert (second["line"], "unicode" in second["error"]) == (3, True)


def test_files_that_are_none_are_refused_and_never_waited_for(folder: Path) -> None:
    with pytest.raises(GenerationError, match=r"there is no file .*none.jsonl"):
        PromptFile.read(folder / "none.jsonl")
    os.mkfifo(folder / "pipe")
    with pytest.raises(GenerationError, match=r"there is no file .*pipe"):
        PromptFile.read(folder / "pipe")
    (folder / "empty.jsonl").write_text("\n\n")
    with pytest.raises(GenerationError, match=r'empty.jsonl has no prompts; each line is an object such as {"prompt"'):
        PromptFile.read(folder / "empty.jsonl")
