"""What img2dataset writes in its three formats gives the same pairs, and its failed downloads are counted."""

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.data.errors import BadDocument, DataError, LeftOut
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, read_records
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat

PAIRS: list[tuple[str, str | None]] = [("cat", "success"), ("gone", "failed_to_download"), ("dog", "success")]
Picture = Callable[..., bytes]


def row(number: int) -> dict[str, object]:
    """Return what its list says of a pair (img2dataset 1.45 with a caption column)."""
    caption, status = PAIRS[number]
    return {
        "url": f"https://example.org/{caption}.jpg",
        "caption": caption,
        "key": f"{number:09}",
        "status": status,
        "error_message": None if status == "success" else "HTTP Error 404: Not Found",
        "width": 12 if status == "success" else None,
    }


@pytest.fixture
def shards(picture: Picture, tmp_path: Path) -> dict[str, Path]:
    """The same shard in each format, by the name of the format."""
    pictures = [
        picture(number, file_format="JPEG") if status == "success" else None for number, (_, status) in enumerate(PAIRS)
    ]
    listing = pyarrow.Table.from_pylist([row(number) for number in range(len(PAIRS))])
    folders = {name: tmp_path / name for name in ("webdataset", "files", "parquet")}
    for folder in folders.values():
        (folder / "00000").mkdir(parents=True)
    for name in ("webdataset", "files"):
        parquet.write_table(listing, folders[name] / "00000.parquet")
    parquet.write_table(
        listing.append_column("jpg", pyarrow.array(pictures, pyarrow.binary())), folders["parquet"] / "00000.parquet"
    )
    with tarfile.open(folders["webdataset"] / "00000.tar", "w") as tar:
        for number, data in enumerate(pictures):
            if data is None:
                continue
            members = {"jpg": data, "json": json.dumps(row(number)).encode(), "txt": PAIRS[number][0].encode()}
            for extension, content in members.items():
                (folders["files"] / "00000" / f"{number:09}.{extension}").write_bytes(content)
                info = tarfile.TarInfo(f"{number:09}.{extension}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    return {
        "webdataset": folders["webdataset"] / "00000.tar",
        "files": folders["files"] / "00000.parquet",
        "parquet": folders["parquet"] / "00000.parquet",
    }


FORMATS = {"webdataset": USUAL, "files": USUAL, "parquet": InputFormat(image_field="jpg")}


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_and_failed_downloads(shards: dict[str, Path], picture: Picture, name: str) -> None:
    pairs, left_out = [], []
    for record in read_records("caption", shards[name], FORMATS[name]):
        try:
            image, caption = parse_record("caption", record, FORMATS[name]).parts
        except LeftOut as failed:
            left_out.append(failed.reason)
            continue
        assert isinstance(image, ImageReference)
        pairs.append((image.read(), caption))
    assert pairs == [(picture(0, file_format="JPEG"), "cat"), (picture(2, file_format="JPEG"), "dog")]
    assert left_out == ["not_downloaded"]


def test_the_same_corpus_of_each_format(shards: dict[str, Path], tokenizer_folder: Path, tmp_path: Path) -> None:
    """Failed downloads do not stop a preparation in which bad documents are errors."""
    corpora = []
    for name, input_format in FORMATS.items():
        output = tmp_path / "out" / name / "corpus"
        manifest = prepare(Preparation("caption", (shards[name],), output, tokenizer_folder, input_format=input_format))
        assert (manifest.documents, manifest.filtered, manifest.skipped) == (2, {"not_downloaded": 1}, {})
        assert manifest.settings.input_format == input_format
        corpora.append({file: record.sha256 for file, record in manifest.files.items()})
    assert len(corpora[0]) == 4
    assert corpora[0] == corpora[1] == corpora[2]


def test_a_caption_from_the_json_of_a_tar(shards: dict[str, Path]) -> None:
    names = InputFormat(caption_field="url")
    first = next(read_records("caption", shards["webdataset"], names))
    assert parse_record("caption", first, names).parts[1] == "https://example.org/cat.jpg"
    names = InputFormat(caption_field="none")
    with pytest.raises(BadDocument, match=r"00000\.tar:000000000: none: Field required \[wrong_fields\]"):
        parse_record("caption", first, names)


def test_a_tar_without_a_list_and_with_a_damaged_one(shards: dict[str, Path]) -> None:
    listing = shards["webdataset"].with_suffix(".parquet")
    listing.write_bytes(listing.read_bytes()[:-20])
    *pairs, damage = read_records("caption", shards["webdataset"])
    assert len(pairs) == 2
    with pytest.raises(BadDocument, match=r"00000\.parquet:row 1: .*\[damaged_file\]"):
        parse_record("caption", damage)
    listing.unlink()
    assert len(list(read_records("caption", shards["webdataset"]))) == 2


def test_a_list_given_instead_of_its_tar(shards: dict[str, Path]) -> None:
    listing = shards["webdataset"].with_suffix(".parquet")
    (listing.parent / "00000").rmdir()
    with pytest.raises(DataError, match=r"holds no pictures; give --input .*00000\.tar"):
        list(read_records("caption", listing))
    shards["webdataset"].unlink()
    with pytest.raises(DataError, match=r"holds no pictures; choose their column with --image-field"):
        list(read_records("caption", listing))


def test_a_pair_without_picture_that_was_downloaded_is_bad(shards: dict[str, Path]) -> None:
    (shards["files"].parent / "00000" / "000000002.jpg").unlink()
    records = list(read_records("caption", shards["files"]))
    image = parse_record("caption", records[2]).parts[0]
    assert isinstance(image, ImageReference)
    with pytest.raises(DataError, match=r"there is no picture at .*files/00000/000000002\.jpg"):
        image.read()
