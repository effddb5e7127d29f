"""The recipe for Debian's corpora, on small packages in the layout of the real ones and, nightly, on those."""

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from tools import fetch_debian_corpora as recipe

DICTIONARY = [
    "\n\n     A motto.\nA \\A\\ n.\n   The first letter.\n",
    "Tür \\Tür\\\n   A door.\n",
    "B \\B\\\n   \x92.\n",
]
WORDNET = """\
  1 This software and database is being provided to you, the LICENSEE, by
00004258 03 n 02 living_thing 0 animate_thing 0 002 @ 00003553 n 0000 ~ 00004475 n 0000 | a living entity; "a | b"
"""
ADJECTIVE = "00001740 00 a 01 galore(ip) 0 001 = 05200169 n 0000 | in great numbers  \n"
FAQ = "Before.\n\n## A.1 What is it?\n\nThis.\n\n# Empty\n\n## A.2 Why?\n\nBecause.\n"
PAGE = """\
<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"><body>
<div class="navheader"><img src="images/next.png" alt="Next" /></div>
<p>Press “OK”.<img src="images/dialog.png" alt="" /></p><div class="navfooter"><img src="images/next.png" /></div>
</body></html>"""


def dictd_number(number: int) -> str:
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 64)
        digits = recipe.DIGITS[digit] + digits
    return digits


def write_dictionary(index: Path) -> None:
    """Three entries, the last of them in another encoding; two words lead to the first."""
    entries = [*(entry.encode() for entry in DICTIONARY[:2]), DICTIONARY[2].encode("latin-1")]
    about = b"00-database-info\n   About it.\n"
    lines, at = [f"00-database-info\tA\t{dictd_number(len(about))}"], len(about)
    for words, entry in zip((["a", "first"], ["tür"], ["b"]), entries, strict=True):
        lines += [f"{word}\t{dictd_number(at)}\t{dictd_number(len(entry))}" for word in words]
        at += len(entry)
    index.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    index.with_suffix(".dict.dz").write_bytes(gzip.compress(about + b"".join(entries)))


def write_stamps(folder: Path) -> None:
    """A wide stamp whose transparent half hides red, one with a palette, a drawing, and a caption of nothing."""
    pixels = np.full((8, 16, 4), (255, 0, 0, 0), dtype=np.uint8)
    pixels[:, 8:] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(folder / "flag.png")
    Image.new("P", (8, 8)).save(folder / "old.png")
    (folder / "flag.txt").write_text("A “flag”.\nde.utf8=Eine Fahne.\n", encoding="utf-8")
    for name in ("old", "drawing", "nothing"):
        (folder / f"{name}.txt").write_text(f"The {name}.")
    (folder / "drawing.svg").write_text("<svg/>")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder with small packages that are there already."""
    packages = tmp_path / "output" / "packages"
    for folder in (recipe.DICTIONARY.parent, recipe.WORDNET, recipe.FAQ, recipe.FORTUNES, recipe.STAMPS / "signs"):
        (packages / folder).mkdir(parents=True)
    (packages / recipe.MANUAL / "images").mkdir(parents=True)
    write_dictionary(packages / recipe.DICTIONARY)
    for suffix in recipe.PARTS_OF_SPEECH:
        (packages / recipe.WORDNET / f"data.{suffix}").write_text({"noun": WORDNET, "adj": ADJECTIVE}.get(suffix, ""))
    (packages / recipe.FAQ / "secA1.md.gz").write_bytes(gzip.compress(FAQ.encode()))
    (packages / recipe.FORTUNES / "science").write_text("1 + 1 = 3.\n\t%\n%\nb\x08bo\x08old\n%\n")
    (packages / recipe.FORTUNES / "science.dat").write_bytes(b"\xff\x00")
    (packages / recipe.FORTUNES / "science.u8").symlink_to("science")
    write_stamps(packages / recipe.STAMPS / "signs")
    (packages / recipe.MANUAL / "page.html").write_text(PAGE, encoding="utf-8")
    (packages / recipe.MANUAL / "index.html").write_text("<html><body><p>Contents</p></body></html>")
    Image.new("RGB", (70, 70)).save(packages / recipe.MANUAL / "images" / "dialog.png")
    return packages.parent


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_texts_are_in_natural_documents(output: Path) -> None:
    counts, left_out = recipe.make(output)
    assert texts(output / "text" / "gcide.jsonl") == [entry.strip() for entry in DICTIONARY[:2]]
    assert texts(output / "text" / "wordnet.jsonl") == [
        'living thing, animate thing (noun): a living entity; "a | b"',
        "galore (adjective): in great numbers",
    ]
    sections = ["Before.", "## A.1 What is it?\n\nThis.", "## A.2 Why?\n\nBecause."]
    assert texts(output / "text" / "anarchism.jsonl") == sections
    assert texts(output / "text" / "fortunes.jsonl") == ["1 + 1 = 3.\n\t%", "bold"]
    assert (counts["text: gcide"], left_out["dictionary entries that are not UTF-8"]) == (2, 1)
    written = [text for file in (output / "text").iterdir() for text in texts(file)]
    assert counts["bytes of text"] == sum(len(text.encode()) for text in written)


def test_stamps_are_on_white_squares_with_english_captions(output: Path) -> None:
    counts, left_out = recipe.make(output)
    pairs = [json.loads(line) for line in (output / "stamps" / "captions.jsonl").read_text("utf-8").splitlines()]
    assert pairs == [
        {"image": "signs/flag.png", "caption": "A “flag”."},
        {"image": "signs/old.png", "caption": "The old."},
    ]
    with Image.open(output / "stamps" / "signs" / "flag.png") as flag:
        assert (flag.mode, flag.size) == ("RGB", (16, 16))
        pixels = np.array(flag)
    assert (pixels[4:12, 8:] == (0, 0, 255)).all()
    assert (pixels[:, :8] == 255).all()
    assert (pixels[[0, 3, 12, 15]] == 255).all()
    assert counts["stamps with captions"] == 2
    assert left_out["stamps that are drawings (SVG)"] == left_out["captions without a stamp"] == 1


def test_pages_with_pictures_come_without_navigation(output: Path) -> None:
    counts, left_out = recipe.make(output)
    assert sorted(path.name for path in (output / "manual").iterdir()) == ["images", "page.html"]
    page = (output / "manual" / "page.html").read_text(encoding="utf-8")
    assert "Press “OK”." in page
    assert page.count("<img") == 1
    assert (output / "manual" / "images" / "dialog.png").is_file()
    assert (counts["pictures in them"], left_out["pages of the manual without pictures"]) == (1, 1)


def test_all_of_it_is_prepared_without_a_bad_document(output: Path, tokenizer_folder: Path) -> None:
    recipe.make(output)
    moved = output.rename(output.with_name("moved"))  # nothing in it depends on where it lies
    inputs = {
        "text": tuple(sorted((moved / "text").glob("*.jsonl"))),
        "caption": (moved / "stamps" / "captions.jsonl",),
        "interleaved": tuple((moved / "manual").glob("*.html")),
    }
    documents = {
        kind: prepare(Preparation(kind, files, moved / kind, tokenizer_folder, filters=Filters(min_image_side=8)))  # type: ignore[arg-type]
        for kind, files in inputs.items()
    }
    assert {kind: (made.documents, made.images) for kind, made in documents.items()} == {
        "text": (9, 0),
        "caption": (2, 2),
        "interleaved": (1, 1),
    }


def test_a_second_run_keeps_what_is_whole_and_makes_the_rest(output: Path) -> None:
    recipe.make(output)
    shutil.rmtree(output / "stamps")
    (output / "stamps.unfinished").mkdir()
    (output / "stamps.unfinished" / "left.png").touch()
    kept = (output / "text" / "gcide.jsonl").stat().st_mtime_ns
    counts, _ = recipe.make(output)
    assert set(counts) == {"stamps with captions"}
    assert (output / "text" / "gcide.jsonl").stat().st_mtime_ns == kept
    assert not (output / "stamps" / "left.png").exists()
    assert recipe.make(output) == (Counter(), Counter())


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in the place of a program of Debian's, which other systems lack."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_a_package_is_unpacked_and_its_archive_removed(programs: Callable[[str, str], None], tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "file").write_text("content")
    programs("apt-get", f'[ "$*" = "download anarchism" ] && tar -cf anarchism_1_all.deb -C {tmp_path} usr')
    programs("dpkg", '[ "$*" = "-x anarchism_1_all.deb ." ] && tar -xf anarchism_1_all.deb')
    (tmp_path / "anarchism.unfinished").mkdir()  # of a run that was stopped
    (tmp_path / "anarchism.unfinished" / "anarchism_0_all.deb").touch()
    recipe.fetch("anarchism", tmp_path / "anarchism")
    unpacked = {str(path.relative_to(tmp_path / "anarchism")) for path in (tmp_path / "anarchism").rglob("*")}
    assert unpacked == {"usr", "usr/file"}


def test_a_package_that_cannot_be_had_says_what_to_do(programs: Callable[[str, str], None], tmp_path: Path) -> None:
    programs("apt-get", "echo 'E: Unable to locate package dict-gcide' >&2; exit 100")
    programs("dpkg", "exit 1")
    app = typer.Typer()
    app.command()(recipe.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path / "output")])
    assert str(result.exception) == (
        "fetch_debian_corpora: `apt-get download dict-gcide` failed; run `apt-get update` as root and try again:\n"
        "E: Unable to locate package dict-gcide"
    )
    assert not (tmp_path / "output" / "packages" / "dict-gcide").exists()


def test_without_apt_it_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(recipe.FetchError, match=r"no apt-get here.*run this on Debian or Ubuntu"):
        recipe.make(tmp_path / "output")


@pytest.mark.nightly
def test_the_real_packages(tmp_path: Path) -> None:
    counts, left_out = recipe.make(tmp_path)
    assert counts["bytes of text"] > 60e6
    assert counts["text: gcide"] > 120_000
    assert counts["text: wordnet"] == 117_659  # the synsets of WordNet 3.0
    assert counts["text: anarchism"] > 700
    assert counts["text: fortunes"] > 14_000
    assert counts["stamps with captions"] + left_out["stamps that are drawings (SVG)"] > 900
    assert counts["pages of the manual"] > 500
    assert left_out["dictionary entries that are not UTF-8"] < 10
