"""Real corpora of all three kinds out of Debian packages: dictionaries, a FAQ, fortunes, captioned stamps, a manual.

    python tools/fetch_debian_corpora.py --output data/debian/raw

needs apt and dpkg, installs nothing and needs no root. It downloads 240 MB and writes what `kosmos preprocess` reads:
`text/*.jsonl`, `stamps/captions.jsonl` with its pictures, and `manual/*.html` with pictures beside them. A folder has
its name when it is whole, so a second run goes on where the first one was stopped.
"""

import gzip
import json
import os
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from lxml import html
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PACKAGES = ("dict-gcide", "wordnet-base", "anarchism", "fortunes", "tuxpaint-stamps-default", "gimp-help-en")
DICTIONARY = Path("dict-gcide/usr/share/dictd/gcide.index")
WORDNET = Path("wordnet-base/usr/share/wordnet")
FAQ = Path("anarchism/usr/share/doc/anarchism/markdown")
FORTUNES = Path("fortunes/usr/share/games/fortunes")
STAMPS = Path("tuxpaint-stamps-default/usr/share/tuxpaint/stamps")
MANUAL = Path("gimp-help-en/usr/share/gimp/2.0/help/en")

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}

LeftOut = Counter[str]
"""What could not be used, by reason."""


class FetchError(Exception):
    """A package cannot be had; the message says what to do."""


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; it is renamed to `folder` at the end, so that a folder of that name is a whole one."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)


def fetch(package: str, folder: Path) -> None:
    """Download a Debian package and unpack it into `folder`. Raises FetchError."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise FetchError(
                f"there is no {program} here, which {package} is downloaded and unpacked with: run this on Debian or "
                f"Ubuntu (a container of one will do) and copy the output folder"
            )
    with whole(folder) as unfinished:
        _run(["apt-get", "download", package], unfinished, "run `apt-get update` as root and try again")
        (archive,) = unfinished.glob("*.deb")
        _run(["dpkg", "-x", archive.name, "."], unfinished, "is the disk full?")
        archive.unlink()


def _run(command: list[str], folder: Path, advice: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"`{' '.join(command)}` failed; {advice}:\n{done.stderr.strip()}")


def dictionary_entries(index: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield the entries of a dictd dictionary: NAME.index has word, offset and length, NAME.dict.dz is gzip."""
    text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    spans = set()  # several words may lead to one entry
    for line in index.read_bytes().splitlines():
        word, offset, length = line.rsplit(b"\t", 2)
        if not word.startswith(b"00-"):  # what dictd says of the dictionary itself
            spans.add((_number(offset.decode()), _number(length.decode())))
    for first, size in sorted(spans):
        try:
            yield text[first : first + size].decode().strip()
        except UnicodeDecodeError:
            left_out["dictionary entries that are not UTF-8"] += 1


def _number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * len(DIGITS) + DIGITS.index(digit)
    return number


def glosses(folder: Path) -> Iterator[str]:
    """Yield WordNet's senses, as `word, synonym (noun): what it means; "an example"` (the format is wndb(5WN))."""
    for suffix, part_of_speech in PARTS_OF_SPEECH.items():
        for line in (folder / f"data.{suffix}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            _, _, _, num_words, *words = fields.split(" ")
            names = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words[: 2 * int(num_words, 16) : 2]]
            yield f"{', '.join(names).replace('_', ' ')} ({part_of_speech}): {gloss.strip()}"


def faq_sections(folder: Path) -> Iterator[str]:
    """Yield the sections of the FAQ, each with its heading; headings without text are left out."""
    for page in sorted(folder.glob("*.md.gz")):
        for section in re.split(r"^(?=#+ )", gzip.decompress(page.read_bytes()).decode(), flags=re.MULTILINE):
            if re.sub(r"^#.*", "", section).strip():
                yield section.strip()


def fortunes(folder: Path) -> Iterator[str]:
    """Yield the fortunes, which lines of `%` separate; what is printed twice over itself for boldness comes once."""
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() and path.suffix != ".dat":
            text = re.sub(r".\x08", "", path.read_text(encoding="utf-8"))
            yield from (fortune.strip("\n") for fortune in re.split(r"^%\n", text, flags=re.MULTILINE))


def write_texts(packages: Path, output: Path, left_out: LeftOut) -> Counter[str]:
    """Write a file of documents for each source; return how many documents and bytes they have."""
    sources: dict[str, Iterable[str]] = {
        "gcide": dictionary_entries(packages / DICTIONARY, left_out),
        "wordnet": glosses(packages / WORDNET),
        "anarchism": faq_sections(packages / FAQ),
        "fortunes": fortunes(packages / FORTUNES),
    }
    counts = Counter[str]()
    for name, texts in sources.items():
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for text in texts:
                if text.strip():
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    counts[f"text: {name}"] += 1
                    counts["bytes of text"] += len(text.encode())
    return counts


def write_stamps(packages: Path, output: Path, left_out: LeftOut) -> Counter[str]:
    """Write the stamps on white squares, and their English captions.

    What is behind transparent places is arbitrary, and a stamp that is no square would lose its ends to the crop.
    """
    counts, lines = Counter[str](), []
    folder = packages / STAMPS
    for description in sorted(folder.rglob("*.txt")):
        picture = description.with_suffix(".png")
        caption = description.read_bytes().partition(b"\n")[0].decode().strip()  # other languages are on later lines
        if not picture.exists():
            drawn = picture.with_suffix(".svg").exists()
            left_out["stamps that are drawings (SVG)" if drawn else "captions without a stamp"] += 1
            continue
        name = picture.relative_to(folder)
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(picture) as image:
            stamp = image.convert("RGBA")
        side = max(stamp.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
        square.convert("RGB").save(output / name)
        lines.append(json.dumps({"image": str(name), "caption": caption}, ensure_ascii=False) + "\n")
        counts["stamps with captions"] += 1
    (output / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return counts


def write_manual(packages: Path, output: Path, left_out: LeftOut) -> Counter[str]:
    """Write the pages that have pictures, without the navigation above and below, and a link to the pictures."""
    counts, folder = Counter[str](), packages / MANUAL
    for page in sorted(folder.glob("*.html")):
        document = html.document_fromstring(page.read_bytes())
        for bar in document.xpath("//div[@class='navheader' or @class='navfooter']"):
            bar.drop_tree()
        num_pictures = len(document.xpath("//img[@src]"))
        if not num_pictures:
            left_out["pages of the manual without pictures"] += 1
            continue
        (output / page.name).write_bytes(html.tostring(document, encoding="utf-8", doctype="<!DOCTYPE html>"))
        counts["pages of the manual"] += 1
        counts["pictures in them"] += num_pictures
    (output / "images").symlink_to(os.path.relpath(folder / "images", output))
    return counts


CORPORA: dict[str, Callable[[Path, Path, LeftOut], Counter[str]]] = {
    "text": write_texts,
    "stamps": write_stamps,
    "manual": write_manual,
}


def make(output: Path, on_step: Callable[[str], object] = lambda step: None) -> tuple[Counter[str], LeftOut]:
    """Fetch and convert what is not in `output` yet; return counts of what was written and left out. Raises FetchError.

    `on_step` is called with what begins.
    """
    packages = output / "packages"
    for package in PACKAGES:
        on_step(f"fetching {package}")
        if not (packages / package).exists():
            fetch(package, packages / package)
    counts, left_out = Counter[str](), LeftOut()
    for name, write in CORPORA.items():
        on_step(f"writing {output / name}")
        if not (output / name).exists():
            with whole(output / name) as unfinished:
                counts += write(packages, unfinished, left_out)
    return counts, left_out


def main(output: Annotated[Path, typer.Option(help="Folder to write; what is there already is kept.")]) -> None:
    """Bring text, captions and interleaved documents out of Debian packages."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(PACKAGES) + len(CORPORA), completed=-1)
            counts, left_out = make(output, lambda step: progress.update(task, advance=1, description=step))
            progress.update(task, advance=1, description=str(output))
    except (FetchError, OSError) as error:
        sys.exit(f"fetch_debian_corpora: {error}")
    table = Table("written", "count")
    for what, count in counts.items():
        table.add_row(what, f"{count:,}")
    for what, count in left_out.items():
        table.add_row(f"left out: {what}", f"{count:,}")
    console.print(table if counts else f"everything is in {output} already", markup=False)


if __name__ == "__main__":
    typer.run(main)
