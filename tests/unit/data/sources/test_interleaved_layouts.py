"""MMC4's and OBELICS's layouts: texts and pictures in reading order, and records that contradict themselves."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import BadDocument
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, read_records
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

WriteLines = Callable[[str, Sequence[str]], Path]
MMC4 = {
    "url": "https://example.org/page",
    "text_list": ["One.", "Two.", "Three.", "Four."],
    "image_info": [
        {"image_name": "c.png", "raw_url": "https://x/c.png", "matched_text_index": 3, "matched_sim": 0.3},
        {"image_name": "a.png", "raw_url": "https://x/a.png", "matched_text_index": 2, "matched_sim": 0.2},
        {"image_name": "b.png", "raw_url": "https://x/b.png", "matched_text_index": 2, "matched_sim": 0.1},
    ],
    "similarity_matrix": [[0.1, 0.2, 0.3, 0.4]],
}
OBELICS = {
    "images": [None, "a.png", None, None, "b.png"],
    "texts": ["One.\n\nTwo.", None, "Three.", "Four.", None],
    "metadata": "[]",
}


def image(name: str, folder: Path) -> ImageReference:
    return ImageReference(name, folder / name)


def test_mmc4(write_lines: WriteLines, tmp_path: Path) -> None:
    """Each image goes before the sentence that it matches, in the order of `image_info`."""
    (record,) = read_records("interleaved", write_lines("a.jsonl", [json.dumps(MMC4)]))
    folder = tmp_path / "images"
    parts = parse_record("interleaved", record, InputFormat(image_folder=folder)).parts
    a, b, c = (image(name, folder) for name in ("a.png", "b.png", "c.png"))
    assert parts == ("One. Two.", a, b, "Three.", c, "Four.")


def test_mmc4_without_name(write_lines: WriteLines) -> None:
    info = {"image_name": None, "raw_url": "https://x/a.png", "matched_text_index": 0}
    (record,) = read_records("interleaved", write_lines("a.jsonl", [json.dumps(MMC4 | {"image_info": [info]})]))
    assert parse_record("interleaved", record).parts[0] == ImageReference("https://x/a.png", None)


def test_obelics_of_lines_and_of_rows(write_lines: WriteLines, tmp_path: Path) -> None:
    lines, rows = write_lines("a.jsonl", [json.dumps(OBELICS)]), tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([OBELICS]), rows)
    a, b = (image(name, tmp_path) for name in ("a.png", "b.png"))
    for file in (lines, rows):
        (record,) = read_records("interleaved", file)
        assert parse_record("interleaved", record).parts == ("One.\n\nTwo.", a, "Three.\n\nFour.", b)


@pytest.mark.parametrize("pair", [False, True])
def test_obelics_with_bytes(tmp_path: Path, pair: bool) -> None:
    data: Any = {"bytes": b"raw", "path": None} if pair else b"raw"
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"images": [[None, data]], "texts": [["One.", None]]}), file)
    (record,) = read_records("interleaved", file)
    assert parse_record("interleaved", record).parts == ("One.", ImageReference("the picture", b"raw"))


@pytest.mark.parametrize(
    "fields, detail",
    [
        (OBELICS | {"texts": ["One."]}, "5 images beside 1 texts"),
        ({"images": [None], "texts": [None]}, "images.0 and texts.0: exactly one of them should be null"),
        ({"images": [None, "a.png"], "texts": ["x", "y"]}, "images.1 and texts.1: exactly one of them should be null"),
        ({"images": [3], "texts": [None]}, "images.0: neither a path nor bytes"),
        ({"images": [None], "texts": [3]}, "texts.0: Input should be a valid string"),
        (MMC4 | {"text_list": ["One."]}, "image_info.0.matched_text_index is 3, text_list has 1 texts"),
        (
            MMC4 | {"image_info": [{"image_name": "a", "matched_text_index": -1}]},
            "image_info.0.matched_text_index: Input",
        ),
        (MMC4 | {"image_info": [{"image_name": "a"}]}, "image_info.0.matched_text_index: Field required"),
        (MMC4 | {"image_info": [{"matched_text_index": 0}]}, "image_info.0: neither image_name nor raw_url"),
        (MMC4 | {"image_info": "none"}, "image_info: Input should be a valid array"),
        (MMC4 | {"text_list": None}, "text_list: Input should be a valid array"),
        ({"text": 3, "images": []}, "text: Input should be a valid string"),
        ({"text": "<image>", "images": "a.png"}, "images: Input should be a valid array"),
        ({"text": "<image>", "images": [None]}, "images.0: neither a path nor bytes"),
    ],
)
def test_records_that_contradict_themselves(write_lines: WriteLines, fields: dict[str, Any], detail: str) -> None:
    (record,) = read_records("interleaved", write_lines("a.jsonl", [json.dumps(fields)]))
    with pytest.raises(BadDocument) as caught:
        parse_record("interleaved", record, USUAL)
    assert caught.value.reason == "wrong_fields"
    assert caught.value.detail.startswith(detail)


def test_a_text_with_markers(
    write_lines: WriteLines, tmp_path: Path, tokenizer_folder: Path, picture: Callable[..., bytes]
) -> None:
    """The markers become ids; what stands around them stays as it is, and no `<image>` is left in a text."""
    text = "<image>\nTwo cats.<image><image> The </image> end\n"
    document: dict[str, Any] = {"text": text, "images": ["a.png", "b.png", "a.png"], "id": 7}
    lines, rows = write_lines("a.jsonl", [json.dumps(document)]), tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([document]), rows)
    with_bytes = tmp_path / "b.parquet"
    pictures = {name: picture(seed) for seed, name in enumerate(("a.png", "b.png"))}
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    document["images"] = [{"bytes": pictures[name], "path": name} for name in document["images"]]
    parquet.write_table(pyarrow.Table.from_pylist([document]), with_bytes)
    tokenizer = KosmosTokenizer.load(tokenizer_folder)
    first, last = tokenizer.encode("\nTwo cats."), tokenizer.encode(" The </image> end\n")
    for file in (lines, rows, with_bytes):
        output = tmp_path / "out" / file.name
        prepare(Preparation("interleaved", (file,), output, tokenizer_folder))
        corpus = Corpus(CorpusConfig(kind="interleaved", prefix=output), tokenizer)
        assert corpus.tokens(0).tolist() == [1, 4, 5, *first, 4, 5, 4, 5, *last, 2]
        assert corpus.images is not None
        assert [corpus.images.read(n) for n in range(3)] == [pictures[name] for name in ("a.png", "b.png", "a.png")]
    (record,) = read_records("text", lines)
    assert parse_record("text", record).parts == (text,)


@pytest.mark.parametrize("text, num_images", [("a <image> b <image>", 1), ("a <image>", 2), ("a", 1), ("<image>", 0)])
def test_more_markers_than_pictures_and_the_reverse(
    write_lines: WriteLines, tokenizer_folder: Path, tmp_path: Path, text: str, num_images: int
) -> None:
    lines = [json.dumps({"text": text, "images": ["a.png"] * num_images}), '{"text": "plain", "images": []}']
    file = write_lines("a.jsonl", lines)
    wanted = Preparation("interleaved", (file,), tmp_path / "corpus", tokenizer_folder)
    markers = text.count("<image>")
    message = rf"a\.jsonl:1: text has {markers} <image>, images {num_images} pictures \[image_count\]"
    with pytest.raises(BadDocument, match=message):
        prepare(replace(wanted, strict=True))
    manifest = prepare(wanted)
    assert (manifest.documents, manifest.images, manifest.skipped) == (1, 0, {"image_count": 1})


def test_rows_that_contradict_themselves(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    images = pyarrow.array(
        [[{"bytes": None, "path": None}]],
        pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
    )
    parquet.write_table(
        pyarrow.table({"images": images, "texts": pyarrow.array([[None]], pyarrow.list_(pyarrow.string()))}), file
    )
    (record,) = read_records("interleaved", file)
    with pytest.raises(BadDocument, match=r"a\.parquet:row 1: images\.0: neither a path nor bytes \[wrong_fields\]"):
        parse_record("interleaved", record)
