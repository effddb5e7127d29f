"""Lines of caption and path, as Conceptual Captions, LAION and COYO have them with addresses."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_kosmos.data.errors import BadDocument
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.encoding import Encoder, EncoderSettings
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, read_records
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat

WriteLines = Callable[[str, Sequence[str]], Path]


def test_pairs(write_lines: WriteLines, tmp_path: Path) -> None:
    file = write_lines("a.tsv", ["a “cat”, \\ \tpictures/cat.png", "", "a dog\tdog.png"])
    records = list(read_records("caption", file))
    assert [record.place for record in records] == ["1", "3"]
    assert parse_record("caption", records[0]).parts == (
        ImageReference("pictures/cat.png", tmp_path / "pictures" / "cat.png"),
        "a “cat”, \\ ",
    )
    names = InputFormat(image_folder=Path("/elsewhere"))
    image = parse_record("caption", records[1], names).parts[0]
    assert image == ImageReference("dog.png", Path("/elsewhere/dog.png"))


@pytest.mark.parametrize(
    "line, reason, detail",
    [
        ("alone", "wrong_fields", "caption<tab>path are 2 fields, not 1"),
        ("a\tb\tc", "wrong_fields", "caption<tab>path are 2 fields, not 3"),
        ("\ta.png", "empty_document", "no text beside its pictures"),
    ],
)
def test_bad_lines(write_lines: WriteLines, line: str, reason: str, detail: str) -> None:
    (record,) = read_records("caption", write_lines("a.tsv", [line]))
    with pytest.raises(BadDocument, match=rf":1: .*{detail} \[{reason}\]"):
        parse_record("caption", record)


@pytest.mark.parametrize("line", ["a cat\thttps://example.org/cat.jpg", "a cat\tftp://example.org/cat.jpg"])
def test_addresses_are_not_fetched(write_lines: WriteLines, tokenizer_folder: Path, line: str) -> None:
    records = list(read_records("caption", write_lines("a.tsv", [line])))
    for filters, num_bad, dropped in ((Filters(), 1, {}), (Filters(drop_unusable_images=True), 0, {"remote_image": 1})):
        encoder = Encoder(EncoderSettings("caption", tokenizer_folder, filters, RowFormat(), USUAL))
        chunk = encoder.encode_chunk(records)
        assert (len(chunk.bad), chunk.dropped_images, chunk.num_documents) == (num_bad, dropped, 0)
        for problem in chunk.bad:
            assert problem.reason == "remote_image"
            assert "is an address, not a picture on this machine" in problem.detail
            assert "with img2dataset" in problem.detail
