"""`kosmos generate` as users call it: one prompt, a stream, a file, and mistakes."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from megatron_kosmos.cli import generate as generate_command
from megatron_kosmos.engine.generate import Decoding, Generator, Sampling
from tests.unit.engine.exported import exported_folder, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    for number in range(2):
        picture(number).save(root / f"{number}.png")
    (root / "prompts.jsonl").write_text(
        '{"prompt": "An image of", "images": ["0.png"], "id": "a"}\n'
        '{"prompt": "<image> and <image>", "images": ["0.png"]}\n'
        '{"prompt": "Words and numbers"}\n'
    )
    return exported_folder(root)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.load(folder)


def kosmos(model: Path, *arguments: object) -> Result:
    app = typer.Typer()
    generate_command.register(app)
    app.callback()(lambda: None)  # as in the application: a group, not a single command
    return CliRunner().invoke(app, ["generate", "--model", str(model), *map(str, arguments)])


def test_one_prompt_is_printed_whole_or_as_a_stream(folder: Path, generator: Generator) -> None:
    pictures = [folder.parent / "0.png", folder.parent / "1.png"]
    options = ["--image", pictures[0], "--image", pictures[1], "--max-new-tokens", 7]
    (expected,) = generator.generate(["An image of"], [pictures], Decoding(7))
    for stream in ([], ["--stream"]):
        result = kosmos(folder, *options, *stream)
        assert result.exit_code == 0, result.output
        assert result.stdout == expected + "\n"


def test_searches_and_draws_as_told(folder: Path, generator: Generator) -> None:
    prompt = ["--prompt", "seven", "--max-new-tokens", 9]
    cases = {
        ("--num-beams", 4, "--length-penalty", -3): Decoding(9, num_beams=4, length_penalty=-3.0),
        ("--sample", "--seed", 3): Decoding(9, sampling=Sampling(seed=3)),
        ("--sample", "--temperature", 3, "--top-p", 0.9, "--top-k", 40): Decoding(
            9, sampling=Sampling(temperature=3.0, top_p=0.9, top_k=40)
        ),
    }
    texts = [kosmos(folder, *prompt, *options).stdout for options in cases]
    assert texts == [generator.generate(["seven"], decoding=decoding)[0] + "\n" for decoding in cases.values()]
    assert len({*texts}) == 3


def test_a_file_is_answered_line_by_line(folder: Path, generator: Generator, tmp_path: Path) -> None:
    prompts, output = folder.parent / "prompts.jsonl", tmp_path / "answers.jsonl"
    options = ["--prompts", prompts, "--num-beams", 2, "--max-new-tokens", 5, "--batch-size", 1]
    printed = kosmos(folder, *options)
    assert printed.exit_code == 0, printed.output
    records = [json.loads(line) for line in printed.stdout.splitlines()]
    first, third = generator.generate(
        ["An image of", "Words and numbers"], [[folder.parent / "0.png"], []], Decoding(5, num_beams=2)
    )
    assert records[0] == {"line": 1, "id": "a", "text": first}
    assert (records[1]["line"], "2 <image> for 1 image(s)" in records[1]["error"]) == (2, True)
    assert records[2] == {"line": 3, "text": third}
    assert '1 of 3 lines have an "error" in place of a text' in printed.stderr
    assert kosmos(folder, *options, "--output", output).exit_code == 0
    assert output.read_text() == printed.stdout
    output.write_text("kept")
    refused = kosmos(folder, *options, "--output", output)
    assert (refused.exit_code, output.read_text()) == (1, "kept")
    assert "answers.jsonl is there already; --overwrite replaces it" in refused.output
    assert kosmos(folder, *options, "--output", output, "--overwrite").exit_code == 0
    assert output.read_text() == printed.stdout


def test_strict_ends_at_a_bad_line_and_a_file_of_bad_lines_fails(folder: Path, tmp_path: Path) -> None:
    strict = kosmos(folder, "--prompts", folder.parent / "prompts.jsonl", "--strict")
    assert strict.exit_code == 1
    assert "prompts.jsonl, line 2: 2 <image> for 1 image(s)" in strict.output
    (tmp_path / "bad.jsonl").write_text("{\n")
    failed = kosmos(folder, "--prompts", tmp_path / "bad.jsonl")
    assert (failed.exit_code, json.loads(failed.stdout.splitlines()[0])["line"]) == (1, 1)
    assert "nothing could be generated from" in failed.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "one <image>"], "1 <image> for 0 image(s) in 'one <image>'"),
        (["--image", "/none.png"], "/none.png: there is no such file"),
        (["--prompts", "/none.jsonl"], "there is no file /none.jsonl"),
        (["--prompts", "x.jsonl", "--prompt", ""], "leave out --prompt and --image"),
        (["--prompts", "x.jsonl", "--stream"], "--stream prints the text of one prompt; leave out --prompts"),
        (["--output", "x.jsonl"], "--output, --overwrite and --strict go with --prompts"),
        (["--temperature", "0.5", "--top-k", "3"], "--temperature, --top-k needs --sample"),
        (["--sample", "--temperature", "0"], "temperature=0.0 is not above 0"),
        (["--stream", "--num-beams", "2"], "knows its text at the end only"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is below 1"),
        (["--max-new-tokens", "400"], "400 new ones are more than the 300 of the model"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder: Path, arguments: list[str], message: str) -> None:
    result = kosmos(folder, *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("kosmos generate: ")
    assert message in result.output


def test_other_mistakes_are_told_too(folder: Path, tmp_path: Path) -> None:
    prompts = folder.parent / "prompts.jsonl"
    before = prompts.read_text()
    for arguments, message in (
        (["--batch-size", 0], "max_batch_size=0 is below 1"),
        (["--output", prompts, "--overwrite"], "prompts.jsonl holds the prompts; write answers to another file"),
        (["--output", tmp_path / "none" / "answers.jsonl"], "No such file or directory"),
        (["--output", tmp_path, "--overwrite"], "Is a directory"),
    ):
        result = kosmos(folder, "--prompts", prompts, *arguments)
        assert (result.exit_code, message in result.output) == (1, True), result.output
    assert prompts.read_text() == before
    assert "there is no folder /nowhere" in kosmos(Path("/nowhere")).output
