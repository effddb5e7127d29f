"""The same documents give the same files from every container, with any number of workers."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.data.errors import BadDocument
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat
from megatron_kosmos.prompt import SourceKind

Compress = Callable[[bytes, str], bytes]
Record = dict[str, Any]
TEXTS = [{"text": f"text {n}\nwith two lines, € and {n * 7919}"} for n in range(600)]
CAPTIONS = [{"image": f"{n % 4}.png", "caption": f"caption {n}"} for n in range(70)]
PAGES = [
    {"images": [None, f"{n % 4}.png", None, "0.png"], "texts": [f"page {n} one", None, "two", None]} for n in range(70)
]


@pytest.fixture
def written(tmp_path: Path, compress: Compress, picture: Callable[..., bytes]) -> dict[str, tuple[SourceKind, Path]]:
    """Texts, pairs and pages in every container, by a name; pictures are beside them."""
    pictures = {f"{seed}.png": picture(seed) for seed in range(4)}
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    files: dict[str, tuple[SourceKind, Path]] = {}
    parts = [
        {"parts": [{"text": page["texts"][0]}, {"image": page["images"][1]}, {"text": "two"}, {"image": "0.png"}]}
        for page in PAGES
    ]
    mmc4 = [
        {
            "text_list": [page["texts"][0], "two"],
            "image_info": [{"image_name": page["images"][1], "matched_text_index": 1}],
        }
        for page in PAGES
    ]
    by_name: dict[str, tuple[SourceKind, Sequence[Record]]] = {
        "text": ("text", TEXTS),
        "caption": ("caption", CAPTIONS),
        "parts": ("interleaved", parts),
        "obelics": ("interleaved", PAGES),
        "mmc4": ("interleaved", mmc4),
    }
    for name, (kind, records) in by_name.items():
        for suffix in ("", ".gz", ".zst"):
            files[f"{name} jsonl{suffix}"] = kind, tmp_path / f"{name}.jsonl{suffix}"
            lines = "".join(json.dumps(record) + "\n" for record in records).encode()
            files[f"{name} jsonl{suffix}"][1].write_bytes(compress(lines, suffix))
    for name in ("text", "caption", "obelics"):
        files[f"{name} parquet"] = by_name[name][0], tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(list(by_name[name][1])), tmp_path / f"{name}.parquet")
    files["caption parquet bytes"] = "caption", tmp_path / "bytes.parquet"
    with_bytes = [pair | {"image": {"bytes": pictures[pair["image"]], "path": None}} for pair in CAPTIONS]
    parquet.write_table(pyarrow.Table.from_pylist(with_bytes), tmp_path / "bytes.parquet")
    files["caption tsv"] = "caption", tmp_path / "caption.tsv"
    files["caption tsv"][1].write_text("".join(f"{pair['caption']}\t{pair['image']}\n" for pair in CAPTIONS))
    files["caption tar"] = "caption", tmp_path / "caption.tar"
    with tarfile.open(tmp_path / "caption.tar", "w") as tar:
        for number, pair in enumerate(CAPTIONS):
            for extension, data in (("png", pictures[pair["image"]]), ("txt", pair["caption"].encode())):
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return files


@pytest.fixture
def corpus(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Prepares a file and returns the files of the corpus, without the manifest, which names the source."""

    def make(kind: SourceKind, *files: Path, **settings: Any) -> dict[str, bytes]:
        output = tmp_path / "out" / "corpus"
        manifest = prepare(Preparation(kind, files, output, tokenizer_folder, overwrite=True, **settings))
        return {name: (output.parent / name).read_bytes() for name in manifest.files}

    return make


Corpus = Callable[..., dict[str, bytes]]


@pytest.mark.parametrize(
    "names",
    [
        ["text jsonl", "text jsonl.gz", "text jsonl.zst", "text parquet"],
        [
            "caption jsonl",
            "caption jsonl.gz",
            "caption jsonl.zst",
            "caption tsv",
            "caption tar",
            "caption parquet",
            "caption parquet bytes",
        ],
        ["parts jsonl", "parts jsonl.gz", "parts jsonl.zst", "obelics jsonl", "obelics jsonl.zst", "obelics parquet"],
        ["mmc4 jsonl", "mmc4 jsonl.gz", "mmc4 jsonl.zst"],
    ],
    ids=lambda names: names[0],
)
def test_the_container_does_not_matter(
    written: dict[str, tuple[SourceKind, Path]], corpus: Corpus, names: list[str]
) -> None:
    corpora = [corpus(*written[name]) for name in names]
    assert len(corpora[0]) >= 2
    for name, other in zip(names, corpora, strict=True):
        assert other == corpora[0], name


@pytest.mark.parametrize(
    "name",
    [
        "text jsonl.zst",
        "text parquet",
        "caption tar",
        "caption parquet bytes",
        "caption tsv",
        "mmc4 jsonl.gz",
        "obelics parquet",
    ],
)
def test_the_number_of_workers_does_not_matter(
    written: dict[str, tuple[SourceKind, Path]], corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """Bad records and the rest of a damaged file included."""
    kind, file = written[name]
    damaged = file.with_name(f"damaged-{file.name}")
    damaged.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    (tmp_path / "3.png").unlink()
    outputs = [corpus(kind, damaged, file, num_workers=num_workers) for num_workers in (1, 2)]
    assert outputs[0] == outputs[1]
    if file.suffix != ".tsv":  # a cut line is only a bad line
        assert b'"damaged_file"' in outputs[0]["corpus.quarantine.jsonl"]


def test_a_damaged_file_stops_a_strict_preparation(written: dict[str, tuple[SourceKind, Path]], corpus: Corpus) -> None:
    kind, file = written["text jsonl.zst"]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadDocument, match=r"text\.jsonl\.zst:\d+: the file cannot be read from here on: Truncated"):
        corpus(kind, file, strict=True)
    whole = written["text jsonl"][1]
    assert b"damaged_file" in corpus(kind, file, whole)["corpus.quarantine.jsonl"]


def test_unusable_pictures_are_dropped_when_asked(
    corpus: Corpus, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    images = ["good.png", "none.png", "cut.png", "pipe.png", "https://example.org/a.png", "a\0b.png"]
    pages = [
        {"images": [None, *images], "texts": ["x", *[None] * len(images)]},
        {"images": [None, "no.png"], "texts": ["y", None]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(page) + "\n" for page in pages))
    with pytest.raises(BadDocument, match=r"a\.jsonl:1: there is no picture at .*none\.png \[missing_image\]"):
        corpus("interleaved", file, strict=True)
    skipped = corpus("interleaved", file, filters=Filters(drop_unusable_images=True))
    assert "corpus.quarantine.jsonl" not in skipped
    manifest = json.loads((tmp_path / "out" / "corpus.manifest.json").read_text())
    assert (manifest["documents"], manifest["images"], manifest["filtered"]) == (1, 1, {"no_images_left": 1})
    assert manifest["dropped_images"] == {"missing_image": 4, "remote_image": 1, "undecodable_image": 1}


def test_the_format_is_in_the_manifest(corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "x"}\n')
    names = InputFormat(text_field="content", image_folder=tmp_path)
    corpus("text", file, input_format=names)
    manifest = json.loads((tmp_path / "out" / "corpus.manifest.json").read_text())
    assert InputFormat.model_validate_json(json.dumps(manifest["settings"]["input_format"])) == names != USUAL
