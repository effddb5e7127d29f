"""Filters of text drop what they say and nothing else, hooks replace or drop texts, and all of it is accounted for."""

import json
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from megatron_kosmos.cli import preprocess
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import Manifest, read_manifest
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.preparation.text_filters import alphabetic_words, describe_hook, duplicate_lines
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

HOOKS = """
import unicodedata

def normalize(text):
    if text.startswith("drop"):
        return None
    return unicodedata.normalize("NFC", text)

def broken(text):
    return {"bad": 1 / 0 if text == "bad" else text}.get(text, text)

def number(text):
    return 7

def blank(text):
    return " "

def half(text):
    return "a\\ud800b"

constant = 3
"""
Prepare = Callable[..., tuple[Manifest, list[str]]]


@pytest.fixture
def prepare_texts(tmp_path: Path, tokenizer_folder: Path, tokenizer: KosmosTokenizer) -> Prepare:
    """Prepares texts with some filters; returns the manifest and the texts that were written."""

    def make(texts: Sequence[str], num_workers: int = 1, strict: bool = True, **filters: Any) -> Any:
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        wanted = Preparation(
            *("text", (file,), tmp_path / "out", tokenizer_folder, num_workers, strict, Filters(**filters)),
            overwrite=True,
        )
        manifest = prepare(wanted)
        reader = IndexedReader(tmp_path / "out")
        return manifest, [tokenizer.decode(reader[number]) for number in range(len(reader))]

    return make


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of hooks that is there for this test alone."""
    name = f"hooks_of_{sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    (tmp_path / f"{name}.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    "filters, dropped",
    [
        ({"min_characters": 3}, ["ab"]),
        ({"max_characters": 3}, ["abcd", "a 1 2", "x\nx\n\nx\ny"]),
        ({"min_alphabetic_words": 0.5}, ["a 1 2"]),
        ({"max_duplicate_lines": 0.4}, ["x\nx\n\nx\ny"]),
        ({"max_duplicate_lines": 0.5}, []),
    ],
)
def test_each_filter_drops_what_it_says(prepare_texts: Prepare, filters: dict[str, Any], dropped: list[str]) -> None:
    texts = ["ab", "abc", "abcd", "a 1 2", "x\nx\n\nx\ny"]
    manifest, kept = prepare_texts(texts, **filters)
    assert kept == [text for text in texts if text not in dropped]
    assert manifest.filtered == ({name: len(dropped) for name in filters} if dropped else {})
    assert manifest.settings.filters == Filters(**filters)


@pytest.mark.parametrize(
    "text, share",
    [("one 2 drei", 2 / 3), ("日本 слово 1st", 1.0), ("— … 12_3", 0.0), ("  x  ", 1.0)],
)
def test_words_have_letters_of_any_script(text: str, share: float) -> None:
    assert alphabetic_words(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text, share", [("a", 0.0), ("a\n a\t\na\nb", 0.5), ("a\n\n\nb\n\n", 0.0), ("a\r\na\r\n", 0.5)]
)
def test_lines_are_compared_without_the_white_space_around_them(text: str, share: float) -> None:
    assert duplicate_lines(text) == pytest.approx(share)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_hook_replaces_and_drops(prepare_texts: Prepare, hooks: str, tmp_path: Path, num_workers: int) -> None:
    hook = describe_hook(f"{hooks}:normalize")
    assert hook.sha256 == sha256((tmp_path / f"{hooks}.py").read_bytes()).hexdigest()
    manifest, kept = prepare_texts(["cafe\u0301", "drop me", "x"], num_workers, text_hook=hook, max_characters=4)
    assert kept == ["café", "x"]  # the filter sees four characters, not five
    assert manifest.filtered == {f"{hooks}:normalize": 1}
    assert manifest.settings.filters.text_hook == hook


@pytest.mark.parametrize(
    "function, detail",
    [
        ("broken", "raised ZeroDivisionError: division by zero"),
        ("number", "returned int, neither str nor None"),
        ("blank", "left no text; None is how it drops a document"),
        ("half", "returned what is no text: .* position 1"),
    ],
)
def test_what_a_hook_does_wrong_is_a_bad_document(
    prepare_texts: Prepare, hooks: str, tmp_path: Path, function: str, detail: str
) -> None:
    hook = describe_hook(f"{hooks}:{function}")
    with pytest.raises(BadDocument, match=rf"a\.jsonl:1: {hooks}:{function} {detail}.*\[text_hook\]"):
        prepare_texts(["bad"], text_hook=hook)
    with pytest.raises(DataError, match="no document left"):
        prepare_texts(["bad"], text_hook=hook, strict=False)
    if function == "broken":
        manifest, kept = prepare_texts(["good", "bad"], text_hook=hook, strict=False)
        assert (manifest.skipped, kept) == ({"text_hook": 1}, ["good"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("{}", "should read package.module:function"),
        ("{}:", "should read package.module:function"),
        ("no_such.module:function", r"module no_such\.module does not import \(ModuleNotFoundError: .*current folder"),
        ("{}:missing", r"hooks_of_\w+\.py has no missing"),
        ("{}:constant", r"hooks_of_\w+\.py holds a int, no function, as constant"),
    ],
)
def test_a_hook_that_is_not_there_says_what_was_looked_for(hooks: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        describe_hook(name.format(hooks))


def test_a_hook_that_was_changed_is_refused(prepare_texts: Prepare, hooks: str, tmp_path: Path) -> None:
    hook = describe_hook(f"{hooks}:normalize")
    (tmp_path / f"{hooks}.py").write_text(HOOKS + "# another\n")
    with pytest.raises(DataError, match="was changed during the preparation"):
        prepare_texts(["x"], text_hook=hook)


def test_only_texts_are_filtered(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    filters = Filters(min_characters=3, max_duplicate_lines=0.3)
    wanted = Preparation("caption", (tmp_path / "a.jsonl",), tmp_path / "out", tokenizer_folder, filters=filters)
    with pytest.raises(DataError, match="min_characters, max_duplicate_lines: for text documents only, not for capt"):
        prepare(wanted)
    with pytest.raises(ValidationError, match="min_characters=5 and max_characters=4 leave no text"):
        Filters(min_characters=5, max_characters=4)


def test_the_command(tokenizer_folder: Path, hooks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option reaches the filter of its name; a hook may lie in the current folder."""
    monkeypatch.undo()  # the module is found through the current folder only
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    texts = ["drop", "ab", "abcdefghijk", "1 2 a", "a b\na b\na b", "stays"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    app = preprocess.commands()

    def run(*options: object) -> Any:
        arguments = ("text", "--input", "a.jsonl", "--output", "out", "--tokenizer", tokenizer_folder, *options)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    numbers = ("--min-characters", 3, "--max-characters", 11, "--min-alphabetic-words", 0.8)
    result = run(*numbers, "--max-duplicate-lines", 0.3, "--text-hook", f"{hooks}:normalize")
    assert result.exit_code == 0, result.output
    counts = {"min_characters": 1, "min_alphabetic_words": 1, "max_duplicate_lines": 1, f"{hooks}:normalize": 1}
    assert read_manifest(tmp_path / "out").filtered == counts
    assert f"{hooks}:normalize" in result.output
    refused = run("--min-characters", 12, "--max-characters", 11, "--overwrite")
    assert "min_characters=12 and max_characters=11 leave no text" in str(refused.exception) + refused.output
    refused = run("--text-hook", f"{hooks}:missing", "--overwrite")
    assert "has no missing" in str(refused.exception) + refused.output
