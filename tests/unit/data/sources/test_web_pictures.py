"""Pages of the web name pictures of one folder only; a person's own lists may name any file."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_kosmos.data.corpora.manifest import read_manifest
from megatron_kosmos.data.errors import UnusableImage
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, read_records
from megatron_kosmos.data.sources.input_format import InputFormat

OUTSIDE = ["../secret.png", "../../x.png", "a/../../secret.png", "../site-2/a.png", "..", "%2e%2e/secret.png"]
"""From the folder of pictures."""


@pytest.fixture
def site(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """A site with a page and pictures, and pictures beside it that are nobody's business."""
    for name in ("site/a.png", "site/pages/b.png", "site/images/c.png", "secret.png", "site-2/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    return tmp_path / "site"


def images_of(file: Path, folder: Path | None) -> list[ImageReference]:
    (record,) = read_records("interleaved", file)
    parts = parse_record("interleaved", record, InputFormat(image_folder=folder)).parts
    return [part for part in parts if isinstance(part, ImageReference)]


def write(layout: str, file: Path, sources: list[str]) -> Path:
    """Write a document with pictures of these names."""
    if layout == "html":
        file = file.with_suffix(".html")
        file.write_text("x" + "".join(f"<img src='{source}'>" for source in sources))
        return file
    if layout == "mmc4":
        info = [{"image_name": source, "matched_text_index": 0} for source in sources]
        fields = {"text_list": ["x"], "image_info": info}
    else:
        fields = {"images": [None, *sources], "texts": ["x", *[None] * len(sources)]}
    if layout == "obelics rows":
        parquet.write_table(pyarrow.Table.from_pylist([fields]), file.with_suffix(".parquet"))
        return file.with_suffix(".parquet")
    file.write_text(json.dumps(fields) + "\n")
    return file


@pytest.mark.parametrize("layout", ["html", "mmc4", "obelics", "obelics rows"])
@pytest.mark.parametrize("is_given", [False, True])
def test_nothing_outside_of_the_folder(site: Path, layout: str, is_given: bool) -> None:
    sources = [source for source in OUTSIDE if layout == "html" or "%" not in source]
    sources += [f"{site.parent}/secret.png", "/etc/passwd"] if layout != "html" else []
    images = images_of(write(layout, site / "a.jsonl", ["a.png", *sources]), site if is_given else None)
    assert images[0] == ImageReference("a.png", site / "a.png")
    for image in images[1:]:
        with pytest.raises(UnusableImage, match=r"leads out of .*/site; .* \(--image-folder\)"):
            image.read()
    assert len(images) == len(sources) + 1


def test_a_page_of_a_site(site: Path) -> None:
    """As in a browser: from the page, or from the root of the site, which --image-folder is."""
    file = write("html", site / "pages" / "a.html", ["b.png", "../images/c.png", "/images/c.png", "./../a.png", "/"])
    b, c, a = site / "pages" / "b.png", site / "images" / "c.png", site / "a.png"
    assert [image.source for image in images_of(file, site)] == [b, c, c, a, site]
    alone = images_of(file, None)
    assert alone[0].source == b
    assert isinstance(alone[1].source, UnusableImage)
    assert alone[2].source == site / "pages" / "images" / "c.png"
    elsewhere = write("html", site.parent / "a.html", ["images/c.png"])
    assert images_of(elsewhere, site)[0].source == c


@pytest.mark.parametrize("source", ["/etc/passwd", "file:///etc/passwd", "//etc/passwd", "\\etc\\passwd", "C:/a.png"])
def test_files_of_the_machine(site: Path, source: str) -> None:
    (image,) = images_of(write("html", site / "a.html", [source]), None)
    with pytest.raises(UnusableImage):
        image.read()


def test_it_is_a_bad_document_or_a_dropped_picture(site: Path, tokenizer_folder: Path) -> None:
    file = write("html", site / "a.html", ["../secret.png"])
    good = write("html", site / "b.html", ["a.png"])
    wanted = Preparation("interleaved", (file, good), site / "corpus", tokenizer_folder)
    manifest = prepare(wanted)
    assert (manifest.documents, manifest.skipped) == (1, {"missing_image": 1})
    assert read_manifest(site / "corpus").images == 1


@pytest.mark.parametrize("form", ["relative", "absolute"])
@pytest.mark.parametrize("kind", ["caption", "tsv", "parts", "marked"])
def test_own_lists_may_name_any_file(site: Path, form: str, kind: str) -> None:
    name = "../secret.png" if form == "relative" else str(site.parent / "secret.png")
    lines = {
        "caption": json.dumps({"image": name, "caption": "x"}),
        "tsv": f"x\t{name}",
        "parts": json.dumps({"parts": [{"text": "x"}, {"image": name}]}),
        "marked": json.dumps({"text": "x <image>", "images": [name]}),
    }
    file = site / ("a.tsv" if kind == "tsv" else "a.jsonl")
    file.write_text(lines[kind] + "\n")
    (record,) = read_records("caption" if kind in {"caption", "tsv"} else "interleaved", file)
    (image,) = (
        part
        for part in parse_record("caption" if kind in {"caption", "tsv"} else "interleaved", record).parts
        if isinstance(part, ImageReference)
    )
    assert image.read() == (site.parent / "secret.png").read_bytes()
