"""Every reader yields what its file holds; what cannot be used is named with file and line."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.sources.documents import (
    Document,
    ImageReference,
    parse_record,
    parse_text,
    parse_texts,
    read_blocks,
    read_records,
    read_texts,
)
from megatron_kosmos.data.sources.readers.records import MAX_RECORD_BYTES
from megatron_kosmos.prompt import SourceKind

WriteLines = Callable[[str, Sequence[str]], Path]


def read_documents(kind: SourceKind, file: Path) -> list[Document]:
    return [parse_record(kind, record) for record in read_records(kind, file)]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_text_from_lines_and_plain_files(write_lines: WriteLines, tmp_path: Path) -> None:
    lines = write_lines("a.jsonl", [json.dumps({"text": "one\ntwo", "url": "ignored"}), "", '{"text": "zwei"}'])
    documents = read_documents("text", lines)
    assert [document.parts for document in documents] == [("one\ntwo",), ("zwei",)]
    assert [document.origin for document in documents] == [f"{lines}:1", f"{lines}:3"]
    plain = tmp_path / "b.txt"
    plain.write_text("a whole\n\nfile\n")
    assert read_documents("text", plain) == [Document(("a whole\n\nfile\n",), f"{plain}:1")]
    assert list(read_texts(lines)) == ["one\ntwo", "zwei"]


def test_captions_from_lines(write_lines: WriteLines, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"cat bytes")
    file = write_lines("c.jsonl", ['{"image": "pictures/cat.png", "caption": "a cat"}'])
    ((image, caption),) = [document.parts for document in read_documents("caption", file)]
    assert isinstance(image, ImageReference)
    assert (image.read(), caption) == (b"cat bytes", "a cat")


def test_captions_from_a_webdataset_tar(tmp_path: Path) -> None:
    members = [
        ("x/1.JPG", b"one"),
        ("x/1.txt", b"eins"),
        ("x/2.json", b'{"caption": "zwei", "nsfw": 0}'),
        ("x/2.png", b"2"),
    ]
    file = write_tar(tmp_path / "c.tar", members)
    documents = read_documents("caption", file)
    assert [document.origin for document in documents] == [f"{file}:x/1", f"{file}:x/2"]
    read = [
        (part.name, part.read()) if isinstance(part, ImageReference) else part
        for document in documents
        for part in document.parts
    ]
    assert read == [("x/1.jpg", b"one"), "eins", ("x/2.png", b"2"), "zwei"]


def test_interleaved(write_lines: WriteLines, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    file = write_lines("i.jsonl", ['{"parts": [{"text": "see "}, {"image": "a.png"}, {"text": " there"}]}'])
    (document,) = read_documents("interleaved", file)
    assert document.parts == ("see ", ImageReference("a.png", tmp_path / "a.png"), " there")


@pytest.mark.parametrize(
    "kind, line, reason, detail",
    [
        ("text", '{"text": "cut', "invalid_json", "EOF while parsing a string at column 13"),
        ("text", '{"text": "\\ud800"}', "invalid_json", "hex escape at column 17"),
        ("text", '["text"]', "wrong_fields", "should be an object"),
        ("text", '{"content": "x"}', "wrong_fields", "text: Field required"),
        ("text", '{"text": 3}', "wrong_fields", "text: Input should be a valid string"),
        ("text", '{"text": ""}', "empty_document", "no text"),
        ("text", '{"text": " \\n\\t"}', "empty_document", "no text"),
        ("caption", '{"caption": "x"}', "wrong_fields", "image: Field required"),
        ("caption", '{"image": "there.png", "caption": ""}', "empty_document", "no text beside its pictures"),
        ("interleaved", '{"parts": []}', "empty_document", "no text"),
        ("interleaved", '{"parts": [{"image": "there.png"}]}', "empty_document", "no text beside its pictures"),
        ("interleaved", '{"parts": [{"text": "x", "image": "there.png"}]}', "wrong_fields", "parts.0"),
        (
            "interleaved",
            '["x"]',
            "wrong_fields",
            "an object with parts, or text_list and image_info, or images and texts",
        ),
        ("interleaved", '{"images": []}', "wrong_fields", "Input should be an object with parts, or text_list"),
    ],
)
def test_bad_lines(
    write_lines: WriteLines, tmp_path: Path, kind: SourceKind, line: str, reason: str, detail: str
) -> None:
    (tmp_path / "there.png").write_bytes(b"x")
    file = write_lines("bad.jsonl", ["", line])
    (record,) = read_records(kind, file)
    with pytest.raises(BadDocument) as caught:
        parse_record(kind, record)
    assert (caught.value.origin, caught.value.reason) == (f"{file}:2", reason)
    assert detail in caught.value.detail
    assert str(caught.value).startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    "line",
    [
        *(
            b'{"text": "a", "text": "b"}',
            b' {"a": NaN, "text": "x"} \r',
            b'{"text": "\\ud83c\\udf89 \\u0000"}',
            b'{"text": "x"} {}',
        ),
        *(
            b'\xef\xbb\xbf{"text": "x"}',
            b'{"text": "x", "b": "\xff"}',
            b'{"text": "\xed\xa0\x80"}',
            b'{"text": "\\udc00"}',
        ),
        *(
            b'{"text": "\\u00a0\\u2003"}',
            b'{"text": null}',
            b'{"text": ["x"]}',
            b"[]",
            b'"text"',
            b"{}",
            b'{"text": "x",}',
        ),
        *(
            b'{"b": 1e999, "text": "x"}',
            b'{"b": ' + b"9" * 5000 + b', "text": "x"}',
            b'{"b": ' + b"[" * 500 + b', "text": "x"}',
        ),
    ],
)
def test_texts_of_lines_are_those_of_the_general_way(tmp_path: Path, line: bytes) -> None:
    """`parse_text` does not build what validates a line; what it gives, and what it refuses, is the same."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(line + b"\n")
    (record,) = read_records("text", file)

    def outcome(parse: Callable[[], object]) -> object:
        try:
            return parse()
        except BadDocument as problem:
            return str(problem)

    assert outcome(lambda: parse_text(record)) == outcome(lambda: parse_record("text", record).parts[0])


def test_invalid_utf8_is_named_by_line(tmp_path: Path) -> None:
    lines, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    lines.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    plain.write_bytes(b"good\nbad \xfe\n")
    with pytest.raises(BadDocument, match=r"a\.jsonl:2: byte 10 \(0xff\) is not UTF-8 \[invalid_utf8\]"):
        read_documents("text", lines)
    with pytest.raises(BadDocument, match=r"a\.txt:2: byte 9 \(0xfe\) is not UTF-8 \[invalid_utf8\]"):
        read_documents("text", plain)


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"1.txt": b"alone"}, "missing_image"),
        ({"1.png": b"alone"}, "missing_caption"),
        ({"1.png": b"a", "1.jpg": b"b", "1.txt": b"x"}, "wrong_fields"),
        ({"1.png": b"a", "1.json": b"{"}, "invalid_json"),
        ({"1.png": b"a", "1.json": b'{"text": "x"}'}, "wrong_fields"),
        ({"1.png": b"a", "1.txt": b"\xff"}, "invalid_utf8"),
        ({"1.png": b"a", "1.txt": b" "}, "empty_document"),
    ],
)
def test_bad_members(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    file = write_tar(tmp_path / "bad.tar", list(members.items()))
    with pytest.raises(BadDocument) as caught:
        read_documents("caption", file)
    assert (caught.value.origin, caught.value.reason) == (f"{file}:1", reason)


@pytest.mark.parametrize("cut", [512, 700, 1024, 3000])
def test_a_truncated_tar_is_an_error_not_a_short_one(tmp_path: Path, cut: int) -> None:
    file = write_tar(tmp_path / "cut.tar", [("1.png", b"x" * 600), ("1.txt", b"one"), ("2.png", b"y")])
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(BadDocument, match=r"cut\.tar:.*: the tar cannot be read after this: .* \[damaged_file\]"):
        read_documents("caption", file)


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [("1.png", b"x"), ("1.txt", b"one"), ("2.png", b"y"), ("2.txt", b"two")])
    content = bytearray(file.read_bytes())
    content[4 * 512] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadDocument, match=r"at byte 2048 there is neither a member nor the end-of-archive mark"):
        read_documents("caption", file)


def test_a_tar_that_repeats_a_name(tmp_path: Path) -> None:
    """That sample is bad, the others are not."""
    file = write_tar(tmp_path / "twice.tar", [("1.png", b"x"), ("1.png", b"y"), ("2.png", b""), ("2.txt", b"two")])
    twice, good = read_records("caption", file)
    with pytest.raises(BadDocument, match=r"twice\.tar:1: the tar has 1\.png more than once \[duplicate_name\]"):
        parse_record("caption", twice)
    assert parse_record("caption", good).parts[1] == "two"


def test_what_is_before_the_damage_of_a_tar_is_read(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [("1.png", b"x"), ("1.txt", b"one"), ("2.png", b"y"), ("3.png", b"y" * 2000)])
    file.write_bytes(file.read_bytes()[:4500])
    sample, damage = read_records("caption", file)
    assert parse_record("caption", sample).parts[1] == "one"
    with pytest.raises(BadDocument, match=r"a\.tar:1: .*\[damaged_file\]"):
        parse_record("caption", damage)


def test_a_large_member_of_a_tar_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar, (tmp_path / "large").open("wb+") as large:
        large.truncate(MAX_RECORD_BYTES + 1)
        tar.addfile(tar.gettarinfo(arcname="1.png", fileobj=large), large)
    with pytest.raises(BadDocument, match=r"large\.tar:1: 1\.png has 67,108,865 bytes; 67,108,864 are the most"):
        read_documents("caption", path)


@pytest.mark.parametrize(
    "kind, name",
    [("text", "a.tar"), ("caption", "a.txt"), ("interleaved", "a.tar"), ("text", "a.parquet.gz"), ("text", "a.gz")],
)
def test_files_of_another_kind(tmp_path: Path, kind: SourceKind, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{kind} documents come in \.jsonl\[\.gz\|\.zst\] or "):
        list(read_records(kind, tmp_path / name))
    with pytest.raises(DataError, match="no input file at"):
        list(read_records(kind, tmp_path / "none.jsonl"))


def test_links_and_folders_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        link: Any = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("1.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    with pytest.raises(BadDocument, match="missing_image"):
        read_documents("caption", path)


@pytest.mark.parametrize(
    "bad",
    ["{", '{"text": ""}', '{"text": " \\n"}', '{"text": 5}', '{"text": null}', '{"a": "b"}', "[1]", "1", '"text"'],
)
def test_a_block_of_texts_is_as_one_by_one(write_lines: WriteLines, bad: str) -> None:
    lines = ['{"text": "one"}', " ", '{"text": "zwei €", "b": {}}', '{"text": "three"}']
    (block,) = read_blocks("text", write_lines("a.jsonl", lines), 1 << 18)
    assert parse_texts(block) == [parse_text(record) for record in block.each()] == ["one", "zwei €", "three"]
    (block,) = read_blocks("text", write_lines("a.jsonl", [*lines, bad]), 1 << 18)
    assert parse_texts(block) is None
    assert [parse_text(record) for record in list(block.each())[:3]] == ["one", "zwei €", "three"]
