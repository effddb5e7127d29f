"""The commands: from text to a tokenizer, from documents to a corpus, with a report or a plain message."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pytest
import typer
from pyarrow import parquet
from typer.testing import CliRunner

from megatron_kosmos.cli import preprocess, tokenizer
from megatron_kosmos.data.corpora.manifest import read_manifest
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

ROOT = Path(__file__).parents[3]
WriteLines = Callable[[str, Sequence[str]], Path]


@pytest.fixture
def kosmos() -> Callable[..., tuple[int, str]]:
    """Runs the commands in this process; returns exit status and everything printed."""
    app = typer.Typer()
    preprocess.register(app)
    tokenizer.register(app)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        said = "" if result.exception is None or isinstance(result.exception, SystemExit) else repr(result.exception)
        return result.exit_code, result.output + said

    return run


Kosmos = Callable[..., tuple[int, str]]


def test_train_and_inspect_a_tokenizer(kosmos: Kosmos, write_lines: WriteLines, tmp_path: Path) -> None:
    pages = list(topics.values())[:20]
    lines = write_lines("a.jsonl", [json.dumps({"text": page}) for page in pages[:10]])
    plain = tmp_path / "b.txt"
    plain.write_text("\n".join(pages[10:]), encoding="utf-8")
    folder = tmp_path / "tokenizer"
    status, said = kosmos("tokenizer", "train", "--input", lines, plain, "--output", folder, "--vocab-size", 350)
    assert status == 0, said
    assert "350 ids, newlines: line" in said
    loaded = KosmosTokenizer.load(folder)
    status, said = kosmos("tokenizer", "inspect", folder, "--text", "two words")
    assert status == 0, said
    assert "<pad> 0  <s> 1  </s> 2  <unk> 3  <image> 4  </image> 5  </line> 6" in said
    assert f"fingerprint: {loaded.fingerprint}" in said
    assert f"{len(loaded.encode('two words'))} tokens: {loaded.encode('two words')}" in said


def test_import_a_tokenizer(kosmos: Kosmos, tokenizer_folder: Path, tmp_path: Path) -> None:
    arguments = (
        "tokenizer",
        "import",
        tokenizer_folder / "tokenizer.model",
        "--newlines",
        "line",
        "--output",
        tmp_path,
    )
    status, said = kosmos(*arguments)
    assert status == 0, said
    assert "<image> 400  </image> 401  </line> 402" in said
    assert KosmosTokenizer.load(tmp_path).vocab_size == 403


def test_preprocess_reports_what_it_skipped(
    kosmos: Kosmos, write_lines: WriteLines, tokenizer_folder: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    good = write_lines("good.jsonl", ['{"image": "a.png", "caption": "one"}'])
    mixed = write_lines(
        "mixed.jsonl", ['{"image": "a.png", "caption": "two"}', '{"image": "none.png", "caption": "x"}']
    )
    arguments = ("preprocess", "captions", "--input", good, mixed, "--output", tmp_path / "c", "--tokenizer")
    status, said = kosmos(*arguments, tokenizer_folder, "--strict")
    assert status != 0
    assert not (tmp_path / "c.manifest.json").exists()
    status, said = kosmos(*arguments, tokenizer_folder, "--num-latents", 4, "--sequence-length", 64)
    assert status == 0, said
    assert re.search(r"documents skipped: missing_image *│ *1 ", said)
    assert f"skipped documents are listed in {tmp_path / 'c.quarantine.jsonl'}" in said
    manifest = read_manifest(tmp_path / "c")
    assert (manifest.documents, manifest.sources) == (2, (str(good), str(mixed)))
    assert (manifest.settings.row_format.sequence_length, manifest.settings.row_format.num_latents) == (64, 4)


def test_shards_and_merge(kosmos: Kosmos, write_lines: WriteLines, tokenizer_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} " * 2000}) for number in range(300)]
    file, output = write_lines("t.jsonl", lines), tmp_path / "t"
    prepare = ("preprocess", "text", "--input", file, "--output", output, "--tokenizer", tokenizer_folder)
    sharded = (*prepare, "--part-megabytes", 1, "--num-shards", 2, "--shard-index")
    status, said = kosmos(*sharded, 2)
    assert status != 0
    assert "--shard-index 2 is not below --num-shards 2" in " ".join(said.replace("│", "").split())
    status, said = kosmos(*sharded, 1)
    assert status == 0, said
    assert f"parts 1 to 2; when all 2 shards are done: kosmos preprocess merge --output {output}" in said
    status, said = kosmos("preprocess", "merge", "--output", output)
    assert status == 1
    assert "run again --num-shards 2 with --shard-index 0" in said
    status, said = kosmos(*prepare, "--part-megabytes", 1, "--num-shards", 9, "--shard-index", 0)
    assert status == 0, said
    assert "there are fewer parts than shards: none; when all 9 shards are done: kosmos preprocess merge" in said
    status, said = kosmos(*sharded, 0)
    assert status == 0, said
    status, said = kosmos("preprocess", "merge", "--output", output)
    assert status == 0, said
    assert re.search(r"documents *│ *300 ", said)
    before = read_manifest(output)

    status, said = kosmos(*prepare, "--part-megabytes", 1)
    assert status == 0, said
    assert f"{output} was finished before; there was nothing to do" in said
    status, said = kosmos(*prepare)
    assert status == 1
    assert "settings.part_bytes was 1048576, is 67108864; give --overwrite" in said
    status, said = kosmos(*prepare, "--overwrite", "--drop-duplicate-documents", "--drop-duplicate-images")
    assert status == 0, said
    after = read_manifest(output)
    filters = after.settings.filters
    assert (filters.drop_duplicate_documents, filters.drop_duplicate_images) == (True, True)
    assert after.files == before.files


def test_names_of_fields_and_a_folder_of_pictures(
    kosmos: Kosmos, tokenizer_folder: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    """Each option reaches the reader: with its default, the command fails."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"FILE": ["a.png", "none.png"], "TEXT": ["one", "two"]}), file)
    options = {"--image-field": "FILE", "--caption-field": "TEXT", "--image-folder": tmp_path / "pictures"}
    arguments = ("preprocess", "captions", "--input", file, "--output", tmp_path / "c", "--tokenizer", tokenizer_folder)
    for left_out in options:
        given = [word for option in options.items() if option[0] != left_out for word in option]
        assert kosmos(*arguments, *given, "--drop-unusable-images", "--strict")[0] != 0
    given = [word for option in options.items() for word in option]
    assert kosmos(*arguments, *given, "--strict")[0] != 0
    status, said = kosmos(*arguments, *given, "--drop-unusable-images")
    assert status == 0, said
    assert re.search(r"images dropped: missing_image *│ *1 ", said)
    names = read_manifest(tmp_path / "c").settings.input_format
    assert (names.image_field, names.caption_field, names.image_folder) == ("FILE", "TEXT", tmp_path / "pictures")

    text = ("preprocess", "text", "--input", file, "--output", tmp_path / "t", "--tokenizer", tokenizer_folder)
    status, said = kosmos(*text)
    assert status != 0
    status, said = kosmos(*text, "--text-field", "TEXT")
    assert status == 0, said


def test_a_tokenizer_from_a_column(kosmos: Kosmos, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": list(topics.values())[:10]}), file)
    arguments = ("tokenizer", "train", "--input", file, "--output", tmp_path / "tokenizer", "--vocab-size", 350)
    assert kosmos(*arguments)[0] != 0
    status, said = kosmos(*arguments, "--text-field", "content")
    assert status == 0, said


def test_the_tool_ends_with_the_message_alone(write_lines: WriteLines, tokenizer_folder: Path, tmp_path: Path) -> None:
    file = write_lines("bad.jsonl", ['{"text": "good"}', '{"text": '])
    tool = [sys.executable, "tools/preprocess_data.py", "text", "--strict"]
    arguments = ["--input", file, "--output", tmp_path / "t", "--tokenizer", tokenizer_folder]
    command = [*tool, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert (
        f"kosmos preprocess: {file}:2: Invalid JSON: EOF while parsing a value at column 9 [invalid_json]"
        in result.stderr
    )
    assert "Traceback" not in result.stderr
