"""One self-contained HTML page of a blend: pictures as the model sees them, packed rows, shares, lengths.

Elements are built with lxml, which escapes every text.

Shape letters: T tokens of a row, D documents.
"""

import base64
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from lxml import html
from lxml.builder import E
from PIL import Image

from megatron_kosmos.data.arrays import Int64Array
from megatron_kosmos.data.inspection import CorpusView, Inspection, PictureView, RowView, Token

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .9em .2em 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1em; }
figure { margin: 0; padding: .6em; border: 1px solid #ddd; } figure img { image-rendering: pixelated; width: 224px; }
figcaption { font-size: 13px; overflow-wrap: anywhere; white-space: pre-line; } .where { color: #777; }
.row { overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; margin-bottom: 1.4em; }
.row p { margin: .3em 0; border-left: 3px solid #ccc; padding-left: .6em; }
.row img { height: 48px; vertical-align: middle; }
.target { background: #dff0d8; } .silent { color: #999; } .problem { color: #a00; } rect { fill: #4a7; }
"""
PRINTABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What neither XML nor lxml takes is shown as U+FFFD."""
BAR_WIDTH, BARS_HEIGHT = 26, 90
"""Pixels of a histogram's bars."""


@dataclass(frozen=True)
class Extent:
    """How much of a blend a page shows."""

    step: int = 1
    """Training step whose rows and pictures come first, counted from 1."""
    num_rows: int = 3
    num_documents: int = 3
    """Documents of a row."""
    num_pictures: int = 24
    num_steps: int = 100
    """Steps that the shares of the corpora are counted over, and that pictures are taken from."""


def render_page(inspection: Inspection, title: str, extent: Extent) -> str:
    """Return the page. Raises DataError when the corpora have ended before `extent.step`."""
    corpora = inspection.corpora(extent.num_steps)
    pictures = islice(inspection.pictures(extent.step, extent.num_steps), extent.num_pictures)
    rows = islice(inspection.rows(extent.step, extent.num_steps), extent.num_rows)
    page = E.html(
        E.head(E.meta(charset="utf-8"), E.title(clean(title)), E.style(STYLE)),
        E.body(
            E.h1(clean(title)),
            E.h2("Corpora"),
            _table(corpora, extent.num_steps),
            E.pre(clean(inspection.packing())),
            E.h2("Lengths of documents, in tokens"),
            *(_histogram(view) for view in corpora),
            E.h2(f"Pictures from step {extent.step} on, as the model sees them"),
            E.div({"class": "pictures"}, *map(_figure, pictures)),
            E.h2(f"Rows from step {extent.step} on"),
            E.p(
                E.span({"class": "target"}, "tokens that count in the loss"),
                ", ",
                E.span({"class": "silent"}, "tokens that don't"),
            ),
            *(_row(inspection, row, extent.num_documents) for row in rows),
        ),
        lang="en",
    )
    text: str = html.tostring(page, encoding="unicode", doctype="<!DOCTYPE html>")
    return text


def clean(text: str) -> str:
    """Return `text` with the characters that a page cannot have replaced."""
    return PRINTABLE.sub("\ufffd", text)


def data_uri(picture: Image.Image) -> str:
    """Return a picture as the content of an `src`."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(corpora: list[CorpusView], num_steps: int) -> Any:
    heads = ("corpus", "kind", "documents", "tokens", "pictures", "share asked", f"share in {num_steps} steps")
    table = E.table(E.tr(*map(E.th, heads)))
    for view in corpora:
        cells = (
            clean(str(view.corpus.prefix)),
            view.corpus.kind,
            f"{view.num_documents:,}",
            f"{int(view.lengths.sum()):,}",
            f"{view.num_images:,}",
            f"{view.weight_share:.2%}",
            f"{view.sample_share:.2%}",
        )
        table.append(E.tr(*map(E.td, cells)))
    return table


def _histogram(view: CorpusView) -> Any:
    """Return bars of documents by length, each bar twice as long as the one before."""
    counts, first = count_by_doubling(view.lengths)
    width, height = BAR_WIDTH * len(counts), BARS_HEIGHT + 20
    drawing = E.svg(width=str(width + BAR_WIDTH), height=str(height), role="img")
    for number, count in enumerate(counts.tolist()):
        low = 1 << (first + number)
        size = round(BARS_HEIGHT * count / int(counts.max()), 1)
        drawing.append(
            E.rect(
                E.title(f"{count:,} documents of {low:,} to {2 * low - 1:,} tokens"),
                x=str(number * BAR_WIDTH),
                y=str(BARS_HEIGHT - size),
                width=str(BAR_WIDTH - 2),
                height=str(size),
            )
        )
        label = {"x": str(number * BAR_WIDTH), "y": str(height - 6), "font-size": "9"}
        drawing.append(E.text(str(low), label))
    return E.div(E.p(clean(f"{view.corpus.prefix}: median {int(np.median(view.lengths)):,}")), drawing)


def count_by_doubling(lengths: Int64Array) -> tuple[Int64Array, int]:
    """Return how many of `lengths` [D] are in 2^k … 2^(k + 1) - 1 for each k from the returned first one on."""
    powers = np.frexp(lengths.astype(np.float64))[1] - 1
    first = int(powers.min())
    return np.bincount(powers - first), first


def _figure(picture: PictureView) -> Any:
    where = E.span({"class": "where"}, clean(f"{picture.corpus.prefix}, picture {picture.image}"))
    if picture.pixels is None:
        shown = E.p({"class": "problem"}, clean(picture.problem))
    else:
        shown = E.img(src=data_uri(picture.pixels), alt="")
    text = [clean(picture.before), " ▣ ", clean(picture.after)] if picture.before else [clean(picture.after)]
    return E.figure(shown, E.figcaption(where, E.br(), *text))


def _row(inspection: Inspection, row: RowView, num_documents: int) -> Any:
    block = E.div({"class": "row"}, E.h3(clean(row.headline)))
    for document in row.documents[:num_documents]:
        block.append(E.p(*_spans(inspection, row, document.tokens)))
    if len(row.documents) > num_documents:
        block.append(E.p(f"and {len(row.documents) - num_documents} more documents"))
    return block


def _spans(inspection: Inspection, row: RowView, tokens: Iterable[Token]) -> Iterator[Any]:
    for token in tokens:
        if token.image is not None:
            picture = inspection.picture(row.corpus, token.image).pixels
            if picture is not None:
                yield E.img(src=data_uri(picture), alt=token.text)
        yield E.span({"class": "target" if token.is_target else "silent"}, clean(token.text))
        yield " "
