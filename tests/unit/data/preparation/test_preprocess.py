"""Preparation writes whole corpora, the same with any number of workers, and accounts for every document."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import read_manifest
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

WriteLines = Callable[[str, Sequence[str]], Path]
Picture = Callable[..., bytes]
Prepare = Callable[..., Preparation]


@pytest.fixture
def preparation(tmp_path: Path, tokenizer_folder: Path) -> Prepare:
    """Returns a preparation of one file to the prefix `out/corpus`."""

    def make(kind: SourceKind, file: Path, **settings: Any) -> Preparation:
        return Preparation(kind, (file,), tmp_path / "out" / "corpus", tokenizer_folder, **settings)

    return make


def interleaved_line(*parts: str | Path) -> str:
    return json.dumps({"parts": [{"text": p} if isinstance(p, str) else {"image": str(p)} for p in parts]})


def documents_at(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    return [reader[number].tolist() for number in range(len(reader))]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_text(preparation: Prepare, write_lines: WriteLines, tokenizer: KosmosTokenizer) -> None:
    texts = ["first\nline", "", "second <image>"]
    file = write_lines("a.jsonl", [json.dumps({"text": text}) for text in texts if text])
    progress: list[tuple[int, int, int]] = []
    wanted = preparation("text", file)
    manifest = prepare(wanted, lambda *counts: progress.append(counts))
    documents = documents_at(wanted.output)
    assert documents == [[1, *tokenizer.encode(text), 2] for text in texts if text]
    size = file.stat().st_size
    assert progress == [(size, size, 2), (size, size, 2)]  # its only chunk, its only part
    assert (manifest.documents, manifest.tokens, manifest.images) == (2, sum(map(len, documents)), 0)
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert manifest == read_manifest(wanted.output)
    assert sorted(manifest.files) == ["corpus.bin", "corpus.idx"]


def test_interleaved(
    preparation: Prepare, write_lines: WriteLines, tokenizer: KosmosTokenizer, picture: Picture
) -> None:
    file = write_lines(
        "i.jsonl", [interleaved_line("see", Path("a.png"), "and", Path("b.png"), "there"), interleaved_line("none")]
    )
    for seed, name in enumerate("ab"):
        (file.parent / f"{name}.png").write_bytes(picture(seed, file_format="JPEG"))
    wanted = preparation("interleaved", file)
    manifest = prepare(wanted)
    document = IndexedReader(wanted.output)[0].tolist()
    see, there = tokenizer.encode("see"), tokenizer.encode("there")
    assert document == [1, *see, 4, 5, *tokenizer.encode("and"), 4, 5, *there, 2]
    store = ImageStore(wanted.output)
    assert [document[position] for position in store.positions] == [4, 4]
    assert store.first_images.tolist() == [0, 2, 2]
    assert [store.read(number) for number in (0, 1)] == [picture(seed, file_format="JPEG") for seed in (0, 1)]
    assert (manifest.images, manifest.max_images_per_document) == (2, 2)
    assert (
        b"000000-000000000.0001.jpg" in files_in(wanted.output.parent)["corpus-images-00000.tar"]
    )  # .png was its name only


def test_output_does_not_depend_on_workers(
    preparation: Prepare, write_lines: WriteLines, picture: Picture, tmp_path: Path
) -> None:
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed))
    lines = [json.dumps({"image": f"{n % 6}.png", "caption": f"caption {n}"}) for n in range(150)]  # 5.png is missing
    file = write_lines("c.jsonl", lines)
    outputs = []
    for num_workers in (1, 3):
        wanted = preparation("caption", file, num_workers=num_workers, overwrite=True, max_shard_bytes=20_000)
        manifest = prepare(wanted)
        outputs.append(files_in(wanted.output.parent))
    assert (manifest.documents, manifest.skipped) == (125, {"missing_image": 25})
    assert sum(name.endswith(".tar") for name in outputs[0]) > 1
    assert "corpus.quarantine.jsonl" in outputs[0]
    assert outputs[0] == outputs[1]


BAD_LINES = {
    "invalid_json": b'{"text": ',
    "wrong_fields": b'{"words": "x"}',
    "empty_document": b'{"text": ""}',
    "invalid_utf8": b'{"text": "\xff"}',
}
BAD_CAPTIONS = {
    "missing_image": b'{"image": "none.png", "caption": "x"}',
    "undecodable_image": b'{"image": "cut.png", "caption": "x"}',
    "too_many_images": b'{"parts": [{"text": "x"}' + b', {"image": "good.png"}' * 11 + b"]}",
}


@pytest.mark.parametrize(
    "reason, num_workers", [*((reason, 1) for reason in (*BAD_LINES, *BAD_CAPTIONS)), ("undecodable_image", 2)]
)
def test_a_bad_document_stops_or_is_accounted_for(
    preparation: Prepare, picture: Picture, tmp_path: Path, reason: str, num_workers: int
) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture()[:200])
    kind: SourceKind = "text" if reason in BAD_LINES else "interleaved" if reason == "too_many_images" else "caption"
    good = {
        "text": b'{"text": "good"}',
        "caption": b'{"image": "good.png", "caption": "good"}',
        "interleaved": b'{"parts": [{"text": "good"}]}',
    }[kind]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([good, (BAD_LINES | BAD_CAPTIONS)[reason], good]) + b"\n")
    settings: dict[str, Any] = {
        "num_workers": num_workers,
        "row_format": RowFormat(sequence_length=64, num_latents=4),
    }
    with pytest.raises(BadDocument) as caught:
        prepare(preparation(kind, file, strict=True, **settings))
    assert (caught.value.origin, caught.value.reason) == (f"{file}:2", reason)
    assert files_in(tmp_path / "out") == {}

    manifest = prepare(preparation(kind, file, **settings))
    assert (manifest.documents, manifest.skipped) == (2, {reason: 1})
    (line,) = files_in(tmp_path / "out")["corpus.quarantine.jsonl"].splitlines()
    entry = json.loads(line)
    assert (entry["origin"], entry["reason"]) == (f"{file}:2", reason)
    assert entry["detail"]
    assert entry["record"] == (BAD_LINES | BAD_CAPTIONS)[reason].decode("utf-8", "backslashreplace") + "\n"


def test_filters_of_the_paper(preparation: Prepare, write_lines: WriteLines, picture: Picture, tmp_path: Path) -> None:
    for seed in range(20):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed, 64, 64))
    (tmp_path / "small.png").write_bytes(picture(0, 64, 63))
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "plain.png")
    png = [Path(f"{n}.png") for n in range(20)]
    small, plain = Path("small.png"), Path("plain.png")
    lines = [
        interleaved_line("many", *png[:7]),
        interleaved_line("two", small, png[0], plain, png[1]),
        interleaved_line("gone", small, plain),
        *(interleaved_line(f"single {n}", png[n]) for n in range(20)),
    ]
    file = write_lines("i.jsonl", lines)
    filters = Filters(max_images=5, halve_single_image=True, min_image_side=64, drop_single_colour=True)
    wanted = preparation("interleaved", file, filters=filters)
    manifest = prepare(wanted)
    assert manifest.dropped_images == {"drop_single_colour": 2, "max_images": 2, "min_image_side": 2}
    halved = manifest.filtered.pop("halve_single_image")
    assert 5 <= halved <= 15
    assert manifest.filtered == {"no_images_left": 1}
    kept = np.diff(ImageStore(wanted.output).first_images)
    assert kept.tolist() == [5, 2] + [1] * (20 - halved)
    assert manifest.skipped == {}

    everything = prepare(preparation("interleaved", file, overwrite=True))
    assert (everything.documents, everything.filtered, everything.dropped_images) == (23, {}, {})


def test_halving_goes_by_content_not_by_place(
    preparation: Prepare, write_lines: WriteLines, picture: Picture, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    lines = [interleaved_line(f"single {n}", Path("a.png")) for n in range(10)]
    kept = []
    for order in (lines, lines[::-1]):
        wanted = preparation(
            "interleaved", write_lines("i.jsonl", order), filters=Filters(halve_single_image=True), overwrite=True
        )
        prepare(wanted)
        kept.append(documents_at(wanted.output))
    assert 0 < len(kept[0]) < 10
    assert kept[0] == kept[1][::-1]


def test_an_existing_corpus_is_replaced_only_when_asked(
    preparation: Prepare, write_lines: WriteLines, picture: Picture, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    file = write_lines("c.jsonl", ['{"image": "a.png", "caption": "x"}'] * 3)
    wanted = preparation("caption", file, max_shard_bytes=1)
    prepare(wanted)
    before = files_in(tmp_path / "out")
    assert sum(name.endswith(".tar") for name in before) == 3
    other = preparation("caption", file, max_shard_bytes=2)
    message = r"there is a corpus at .* already, another one: settings\.max_shard_bytes was 1, is 2; give --overwrite"
    with pytest.raises(DataError, match=message):
        prepare(other)
    assert files_in(tmp_path / "out") == before
    prepare(preparation("text", write_lines("t.jsonl", ['{"text": "x"}']), overwrite=True))
    assert list(files_in(tmp_path / "out")) == ["corpus.bin", "corpus.idx", "corpus.manifest.json"]


def test_a_failed_replacement_leaves_the_old_corpus(
    preparation: Prepare, write_lines: WriteLines, tmp_path: Path
) -> None:
    prepare(preparation("text", write_lines("t.jsonl", ['{"text": "x"}'])))
    before = files_in(tmp_path / "out")
    with pytest.raises(BadDocument):
        prepare(preparation("text", write_lines("t.jsonl", ['{"text": "x"}', "bad"]), overwrite=True, strict=True))
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize("lines, what", [([], "the inputs are empty"), (["bad"], "{'invalid_json': 1}; the first: ")])
def test_nothing_left_is_an_error(preparation: Prepare, write_lines: WriteLines, lines: list[str], what: str) -> None:
    with pytest.raises(DataError, match=f"no document left for .*/out/corpus: {what}"):
        prepare(preparation("text", write_lines("t.jsonl", lines)))


def test_a_tokenizer_without_image(preparation: Prepare, write_lines: WriteLines, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").touch()
    wanted = Preparation("text", (write_lines("t.jsonl", ['{"text": "x"}']),), tmp_path / "out" / "corpus", tmp_path)
    with pytest.raises(DataError, match="without <image>; run `kosmos tokenizer import"):
        prepare(wanted)
