"""Rows of parquet files: chosen columns, places, and what cannot be used."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.sources.documents import Document, ImageReference, parse_record, read_records, read_texts
from megatron_kosmos.data.sources.input_format import InputFormat
from megatron_kosmos.data.sources.readers.records import MAX_RECORD_BYTES
from megatron_kosmos.prompt import SourceKind

HF_IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def read(kind: SourceKind, file: Path, names: InputFormat) -> list[Document]:
    return [parse_record(kind, record, names) for record in read_records(kind, file, names)]


def test_text_of_a_chosen_column(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"n": range(1000), "content": [f"text {n}" for n in range(1000)]})
    parquet.write_table(table, file, row_group_size=300)
    documents = read("text", file, InputFormat(text_field="content"))
    assert [document.parts[0] for document in documents] == [f"text {n}" for n in range(1000)]
    assert [document.origin for document in documents[:2]] == [f"{file}:row 1", f"{file}:row 2"]
    records = list(read_records("text", file, InputFormat(text_field="content")))
    assert records[-1].offset == file.stat().st_size
    assert list(read_texts(file, InputFormat(text_field="content"))) == [f"text {n}" for n in range(1000)]


@pytest.mark.parametrize("text_type", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_other_types_of_text(tmp_path: Path, text_type: pyarrow.DataType) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", "two", "one"]).cast(text_type)}), file)
    assert list(read_texts(file)) == ["one", "two", "one"]


def test_pictures_as_paths_bytes_or_both(tmp_path: Path) -> None:
    columns = {
        "path": pyarrow.array(["a.png"]),
        "bytes": pyarrow.array([b"raw"]),
        "hf": pyarrow.array([{"bytes": b"hf", "path": "b.png"}], HF_IMAGE),
        "hf path": pyarrow.array([{"bytes": None, "path": "c.png"}], HF_IMAGE),
        "TEXT": pyarrow.array(["x"]),
    }
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), file)
    expected = {
        "path": ImageReference("a.png", tmp_path / "a.png"),
        "bytes": ImageReference("the picture", b"raw"),
        "hf": ImageReference("b.png", b"hf"),
        "hf path": ImageReference("c.png", tmp_path / "c.png"),
    }
    for column, image in expected.items():
        (document,) = read("caption", file, InputFormat(image_field=column, caption_field="TEXT"))
        assert document.parts == (image, "x")
    (document,) = read("caption", file, InputFormat(image_field="path", caption_field="TEXT", image_folder=Path("/p")))
    assert document.parts[0] == ImageReference("a.png", Path("/p/a.png"))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("text", {}, "no column 'text'; it has words, size; choose one with --text-field"),
        ("caption", {}, "no column 'caption'; .* with --caption-field"),
        ("caption", {"caption_field": "words"}, "no column 'image'; .* with --image-field"),
        (
            "interleaved",
            {},
            "need the columns parts, or text_list and image_info, .*, or text and images; it has words",
        ),
    ],
)
def test_columns_that_are_missing(tmp_path: Path, kind: SourceKind, options: dict[str, str], message: str) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"words": ["x"], "size": [3]}), file)
    with pytest.raises(DataError, match=rf"a\.parquet: .*{message}") as caught:
        read(kind, file, InputFormat.model_validate(options))
    assert not isinstance(caught.value, BadDocument)


@pytest.mark.parametrize(
    "text, detail",
    [
        (pyarrow.array([3]), "text: Input should be a valid string"),
        (pyarrow.array([None], pyarrow.string()), "text: Input should be a valid string"),
        (pyarrow.array([["x"]]), "text: Input should be a valid string"),
        (pyarrow.array([b"x"]), "text: Input should be a valid string"),
    ],
)
def test_rows_of_wrong_types(tmp_path: Path, text: pyarrow.Array, detail: str) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": text}), file)
    with pytest.raises(BadDocument, match=rf"a\.parquet:row 1: {detail} \[wrong_fields\]"):
        list(read_texts(file))


def test_a_row_that_is_not_utf8_is_the_only_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = pyarrow.array([b"good", b"bad \xff", b"good too"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), file)
    first, bad, third = read_records("text", file)
    assert [parse_record("text", record).parts for record in (first, third)] == [("good",), ("good too",)]
    with pytest.raises(BadDocument, match=r":row 2: column text: byte 4 \(0xff\) is not UTF-8 \[invalid_utf8\]"):
        parse_record("text", bad)


def test_a_row_beyond_the_limit_is_the_only_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "x" * (MAX_RECORD_BYTES + 1), "three"]}), file)
    first, large, third = read_records("text", file)
    assert [parse_record("text", record).parts for record in (first, third)] == [("one",), ("three",)]
    with pytest.raises(BadDocument, match=r":row 2: the row has 67,108,\d+ bytes; .* \[too_large\]"):
        parse_record("text", large)


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(1000)]}), file, row_group_size=100)
    whole = file.read_bytes()
    zeroed = bytearray(whole)
    zeroed[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    for content, num_good in ((whole[:-100], 0), (b"", 0), (b"text", 0), (bytes(zeroed), 100)):
        file.write_bytes(content)
        *good, damage = read_records("text", file)
        assert [parse_record("text", record).parts[0] for record in good] == [f"text {n}" for n in range(len(good))]
        assert num_good <= len(good) < 1000
        with pytest.raises(BadDocument, match=rf"row {len(good) + 1}: the parquet file cannot be read .*damaged_file"):
            parse_record("text", damage)
