"""Lines of any size, zeros, surrogates and JSON made to hurt: memory stays flat, nothing is cut in silence."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.documents import parse_record, read_records, read_texts
from megatron_kosmos.data.sources.readers.records import MAX_RECORD_BYTES
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.sources.limited_reading import read_limited

Compress = Callable[[bytes, str], bytes]
WITH_ZEROS = ["a\0b", "\0", "\0\0x\0", "two\0\nlines\0", "\ufeffmark", "a\u2028b\r\nc\x85d", "\x1b[31m\x7f"]
LARGE_LINE_MEGABYTES = 5 * MAX_RECORD_BYTES >> 20
"""What a line of any size may take: the pieces of the largest one that is read, and them joined."""


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_100_megabytes(tmp_path: Path, compress: Compress, suffix: str) -> None:
    """Compressed, it is a bomb: a file of 100 kB."""
    file = tmp_path / f"a.jsonl{suffix}"
    large = b'{"text": "' + b"x" * 100_000_000 + b'"}'
    file.write_bytes(compress(b'{"text": "one"}\n' + large + b'\n{"text": "three"}\n', suffix))
    assert file.stat().st_size < 200_000 or not suffix
    outcome = read_limited("text", file, megabytes=LARGE_LINE_MEGABYTES)
    assert outcome.good == [["one"], ["three"]]
    assert outcome.bad == [(f"{file}:2", "too_large", "the line has 100,000,013 bytes; 67,108,864 are the most")]
    assert outcome.megabytes < LARGE_LINE_MEGABYTES


@pytest.mark.nightly
@pytest.mark.timeout(1300)
def test_a_bomb_of_10_gigabytes(tmp_path: Path, compress: Compress) -> None:
    file = tmp_path / "a.jsonl.gz"
    member = compress(bytes(100_000_000), ".gz")
    with file.open("wb") as stream:
        stream.writelines([compress(b'{"text": "one"}\n', ".gz"), *[member] * 100])
        stream.write(compress(b'\n{"text": "three"}\n', ".gz"))
    assert file.stat().st_size < 20_000_000
    outcome = read_limited("text", file, megabytes=LARGE_LINE_MEGABYTES, seconds=1200)
    assert outcome.good == [["one"], ["three"]]
    assert outcome.bad == [(f"{file}:2", "too_large", "the line has 10,000,000,001 bytes; 67,108,864 are the most")]
    assert outcome.megabytes < LARGE_LINE_MEGABYTES


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "byte-bpe"])
def test_zeros_and_controls_are_text(tmp_path: Path, model_type: Literal["unigram", "bpe", "byte-bpe"]) -> None:
    """From JSON's escapes and from plain files to the corpus and back, not a character is lost."""
    train_tokenizer(list(topics.values())[:10], TrainingSettings(400, model_type)).save(tmp_path / "tokenizer")
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in WITH_ZEROS))
    files = [lines]
    for number, text in enumerate(WITH_ZEROS):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_bytes(text.encode())
    prepare(Preparation("text", tuple(files), tmp_path / "corpus", tmp_path / "tokenizer"))
    tokenizer = KosmosTokenizer.load(tmp_path / "tokenizer")
    corpus = Corpus(CorpusConfig(kind="text", prefix=tmp_path / "corpus"), tokenizer)
    assert [tokenizer.decode(corpus.tokens(number)) for number in range(len(corpus))] == WITH_ZEROS * 2


def test_zeros_in_captions_and_names(tmp_path: Path, picture: Callable[..., bytes], tokenizer_folder: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.tsv"
    pairs = [{"image": "a.png", "caption": "a\0b"}, {"image": "a.png\0.png", "caption": "x"}]
    lines.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    table.write_bytes(b"a\0b\ta.png\nx\ta.png\0\n")
    output = tmp_path / "corpus"
    manifest = prepare(Preparation("caption", (lines, table), output, tokenizer_folder))
    assert (manifest.documents, manifest.skipped) == (2, {"missing_image": 2})
    assert r"'a.png\\x00' is no name of a file" in output.with_name("corpus.quarantine.jsonl").read_text()
    tokenizer = KosmosTokenizer.load(tokenizer_folder)
    corpus = Corpus(CorpusConfig(kind="caption", prefix=output), tokenizer)
    assert [tokenizer.decode(corpus.tokens(number)) for number in (0, 1)] == ["a\0b"] * 2


DEEP = 100_000
MANY_NINES = "9" * 100_000


@pytest.mark.parametrize(
    "kind, line, outcome",
    [
        ("text", '{"text": ' + "[" * DEEP + "]" * DEEP + "}", "invalid_json"),
        ("text", '{"text": "x", "meta": ' + '{"a":' * DEEP + "0" + "}" * DEEP + "}", "invalid_json"),
        ("interleaved", '{"parts": ' + "[" * DEEP + "]" * DEEP + "}", "invalid_json"),
        ("text", f'{{"text": "x", "size": {MANY_NINES}}}', "invalid_json"),
        ("text", f'{{"text": {MANY_NINES}}}', "invalid_json"),
        ("text", '{"text": "x", "score": 1e999999}', "x"),
        ("text", '{"text": "x", "score": NaN}', "x"),
        ("text", '{"text": NaN}', "wrong_fields"),
        ("text", '{"text": -Infinity}', "wrong_fields"),
        ("text", '{"text": "x", "text": "y"}', "y"),
        ("text", '{"text": "x", "text": 3}', "wrong_fields"),
        ("text", '{"text": true}', "wrong_fields"),
        ("text", '{"text": {"text": "x"}}', "wrong_fields"),
        ("text", '{"text": null}', "wrong_fields"),
        ("text", "null", "wrong_fields"),
        ("text", '"text"', "wrong_fields"),
        ("text", '{"text": "a\0b"}', "invalid_json"),
        ("text", '{"text": "x"} {"text": "y"}', "invalid_json"),
        ("text", '{"text": "\\ud800"}', "invalid_json"),
        ("text", '{"text": "\\udc00x"}', "invalid_json"),
        ("text", '{"text": "x", "\\ud800": 1}', "invalid_json"),
        ("text", '{"text": "\\ud83d\\ude00"}', "😀"),
        ("caption", '{"image": {"path": ["a"]}, "caption": "x"}', "wrong_fields"),
        ("caption", '{"image": 3, "caption": "x"}', "wrong_fields"),
        *(
            ("interleaved", f'{{"text_list": ["a"], "image_info": [{{"image_name": "a", {index}}}]}}', "wrong_fields")
            for index in ('"matched_text_index": ' + number for number in ("NaN", "1e30", "1.5", str(2**64), "-1", "1"))
        ),
    ],
)
def test_json_made_to_hurt(tmp_path: Path, kind: SourceKind, line: str, outcome: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line + "\n")
    (record,) = read_records(kind, file)
    if outcome in {"invalid_json", "wrong_fields"}:
        with pytest.raises(BadDocument) as caught:
            parse_record(kind, record)
        assert (caught.value.origin, caught.value.reason) == (f"{file}:1", outcome)
        assert len(str(caught.value)) < 1000
    else:
        assert parse_record(kind, record).parts == (outcome,)


@pytest.mark.parametrize("entity", ["&#xD800;", "&#0;", "&#x110000;", "&#99999999999999999999;"])
def test_entities_that_are_no_characters(tmp_path: Path, entity: str, tokenizer: KosmosTokenizer) -> None:
    file = tmp_path / "a.html"
    file.write_text(f"<p>a{entity}b")
    (record,) = read_records("interleaved", file)
    (text,) = parse_record("interleaved", record).parts
    assert isinstance(text, str)
    assert (text[0], text[-1]) == ("a", "b")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    surrogate = pyarrow.array([b"good", b"\xed\xa0\x80", b"a\0b"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": surrogate}), file)
    good, bad, with_zero = read_records("text", file)
    assert [parse_record("text", record).parts for record in (good, with_zero)] == [("good",), ("a\0b",)]
    with pytest.raises(BadDocument, match=r"a\.parquet:row 2: .* \[invalid_utf8\]"):
        parse_record("text", bad)


@pytest.mark.parametrize(
    "name", ["folder.jsonl", "pipe.jsonl", "device.jsonl", "loop.jsonl", "none.jsonl", "a\0.jsonl"]
)
def test_what_is_no_file_is_no_input(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match="no input file at "):
        prepare(Preparation("text", (tmp_path / name,), tmp_path / "corpus", tokenizer_folder))


def test_a_link_to_a_file_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    assert list(read_texts(tmp_path / "link.jsonl")) == ["x"]


def test_a_name_of_an_input_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"\xff.jsonl")
    file.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"udcff\.jsonl': the name of an input file should be UTF-8"):
        list(read_texts(file))


@pytest.mark.parametrize("closed", ["a.jsonl", "a.tar", ""])
def test_an_input_that_may_not_be_read(closed: str) -> None:
    kind: SourceKind = "caption" if closed == "a.tar" else "text"
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users anyway
        file = Path(folder) / (closed or "a.jsonl")
        file.touch()
        Path(folder).chmod(0o755)
        (file if closed else Path(folder)).chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(DataError, match=r"a\.[a-z]*.*: Permission denied"):
                list(read_records(kind, file))
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)


@pytest.mark.parametrize("name", ["pipe.png", "device.png", "folder.png", "loop.png", "large.png", "none.png"])
def test_what_is_no_file_is_no_picture(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(1 << 40)
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "caption": "x"}) + "\n")
    with pytest.raises(BadDocument) as caught:
        prepare(Preparation("caption", (tmp_path / "a.jsonl",), tmp_path / "corpus", tokenizer_folder, strict=True))
    assert caught.value.origin == f"{tmp_path / 'a.jsonl'}:1"
    assert caught.value.reason == ("too_large" if name == "large.png" else "missing_image")
