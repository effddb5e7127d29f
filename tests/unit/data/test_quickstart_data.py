"""The quickstart's corpora: nothing held out occurs in training, and each is in the form that preparation reads."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_kosmos.cli.preprocess import KINDS
from megatron_kosmos.data.images.decoding import decode_image
from megatron_kosmos.data.sources.documents import Document, ImageReference, parse_record, read_records
from tools.quickstart_data import NAMES, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    make(path, seed=1)
    return path


def documents(folder: Path, part: str, command: str | None = None) -> Iterator[Document]:
    """Read the corpora that corpora.yaml lists for a split."""
    for entry in yaml.safe_load((folder / "corpora.yaml").read_text())["corpora"]:
        if entry["name"].endswith(part) and command in (None, entry["command"]):
            for name in entry["inputs"]:
                kind = KINDS[entry["command"]]
                yield from (parse_record(kind, record) for record in read_records(kind, folder / name))


def pictures(folder: Path, part: str, command: str | None = None) -> list[bytes]:
    parts = [piece for document in documents(folder, part, command) for piece in document.parts]
    return [piece.read() for piece in parts if isinstance(piece, ImageReference)]


def paragraphs(folder: Path, part: str) -> set[str]:
    texts = [
        piece for document in documents(folder, part, "text") for piece in document.parts if isinstance(piece, str)
    ]
    return {" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")}


def test_no_heldout_digit_is_in_any_training_document(folder: Path) -> None:
    train, heldout = Counter(pictures(folder, "train")), Counter(pictures(folder, "heldout"))
    assert (len(train), len(heldout)) == (1438, 359)
    assert train.keys().isdisjoint(heldout)
    assert set(train.values()) == set(heldout.values()) == {2}  # once with a caption, once interleaved


def test_no_heldout_paragraph_is_in_any_training_text(folder: Path) -> None:
    train, heldout = paragraphs(folder, "train"), paragraphs(folder, "heldout")
    assert train.isdisjoint(heldout)
    assert len(train) > 1500
    assert len(heldout) > 100
    tokenizer_text = " ".join((folder / "tokenizer.txt").read_text().split())
    assert not [paragraph for paragraph in heldout if len(paragraph) > 60 and paragraph in tokenizer_text]


def test_captions_name_the_digit(folder: Path) -> None:
    captions = Counter(document.parts[1] for document in documents(folder, "heldout", "captions"))
    assert set(captions) == {f"a handwritten {name}" for name in NAMES}
    assert min(captions.values()) > 20
    image = decode_image(pictures(folder, "heldout", "captions")[0])
    assert image.size == (32, 32)


def test_interleaved_documents_name_each_picture(folder: Path) -> None:
    sizes = Counter[int]()
    for document in documents(folder, "train", "interleaved"):
        count = sum(isinstance(part, ImageReference) for part in document.parts)
        words = " ".join(part for part in document.parts if isinstance(part, str))
        assert words.count("a handwritten") == count
        sizes[count] += 1
    assert min(sizes[2], sizes[3], sizes[4]) > 100


def test_the_files_are_the_same_each_time_and_others_with_another_seed(folder: Path, tmp_path: Path) -> None:
    def digests(path: Path) -> dict[str, str]:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    make(tmp_path / "again", seed=1)
    assert digests(tmp_path / "again") == digests(folder)
    make(tmp_path / "other", seed=2)
    heldout = [json.loads(line)["image"] for line in (folder / "captions_heldout.jsonl").read_text().splitlines()]
    other = [
        json.loads(line)["image"] for line in (tmp_path / "other" / "captions_heldout.jsonl").read_text().splitlines()
    ]
    assert len(set(heldout) & set(other)) < len(heldout) / 2
