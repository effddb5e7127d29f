"""Pages as texts and pictures in reading order, with the pictures of the page's folder."""

import base64
from pathlib import Path

import pytest

from megatron_kosmos.data.errors import BadDocument
from megatron_kosmos.data.sources.documents import ImageReference, parse_record, read_records
from megatron_kosmos.data.sources.html_pages import MAX_PAGE_BYTES, parse_page
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat

PAGE = """<!DOCTYPE html>
<html><head><title>Not read</title><style>p { color: red }</style><meta charset="utf-8"></head>
<body>
  <h1>Brushes &amp; <em>pens</em></h1>
  <p>A brush  is
     shown in <a href="x.html">figure 1</a>:</p>
  <div><img src="images/a%20b.png?v=2#top" alt="not read"></div>
  <script>if (a < b) { document.write("<p>not read</p>") }</script>
  <p>Then <img src='c.png'/> and <b>so</b> on.<br>Next line<!-- not read -->
  <ul><li>one<li>two €</ul>
  <table><tr><td>1</td><td>2</td></tr></table>
  <pre>def f():
    return 1</pre>
  <noscript>not read</noscript> The end.
</body></html>
"""


def test_texts_and_pictures_in_reading_order(tmp_path: Path) -> None:
    for name in ("page.html", "page.htm"):
        (tmp_path / name).write_text(PAGE, encoding="utf-8")
        (record,) = read_records("interleaved", tmp_path / name)
        document = parse_record("interleaved", record)
        assert document.origin == f"{tmp_path / name}:1"
        assert document.parts == (
            "Brushes & pens\nA brush is shown in figure 1:\n",
            ImageReference("images/a b.png", tmp_path / "images" / "a b.png"),
            "\nThen ",
            ImageReference("c.png", tmp_path / "c.png"),
            " and so on.\nNext line\none\ntwo €\n1 2\ndef f():\n    return 1\nThe end.",
        )


@pytest.mark.parametrize(
    "page, texts",
    [
        ("plain text, a < b", ["plain text, a < b"]),
        ("<p>one<p>two", ["one\ntwo"]),
        ("<div><div><p>one</p></div></div><div>two</div>", ["one\ntwo"]),
        ("a<b>b</b>c <i>d</i> e", ["abc d e"]),
        ("<script>never closed <p>x", []),
        ("<p>one</p><template><p>no</p></template><svg><title>no</title></svg><p>two</p>", ["one\ntwo"]),
        ("&lt;p&gt; &euro; &#8364; &unknown;", ["<p> € € &unknown;"]),
        ("a\x00b", ["a\ufffdb"]),
        ("<p></p> \n <div> </div>", []),
        ("", []),
        ("<!--", []),
        ("<![<![" * 1000, []),
    ],
)
def test_texts(page: str, texts: list[str]) -> None:
    assert parse_page(page) == texts


@pytest.mark.parametrize("piece", ["<!--", "<a", "<div>", "<table><tr>", "&", "<p a='", "</", "<b>"])
def test_damaged_pages_are_parsed_in_linear_time(piece: str) -> None:
    """Python's html.parser takes half a minute for 80 kB of the first: with it, this test does not end in time."""
    parse_page(piece * (400_000 // len(piece)))


def test_other_sources_of_pictures(tmp_path: Path) -> None:
    sources = {
        "https://example.org/a.png": ImageReference("https://example.org/a.png", None),
        "//example.org/a.png": ImageReference("//example.org/a.png", None),
        "/images/a.png": ImageReference("images/a.png", tmp_path / "site" / "images" / "a.png"),
        f"data:image/png;base64,{base64.b64encode(b'raw').decode()}": ImageReference("data:", b"raw"),
        "data:image/svg+xml,%3Csvg%3E": ImageReference("data:", b"<svg>"),
    }
    file = tmp_path / "a.html"
    file.write_text("x" + "".join(f"<img src='{source}'>" for source in sources) + "<img><img src=''>")
    (record,) = read_records("interleaved", file)
    parts = parse_record("interleaved", record, InputFormat(image_folder=tmp_path / "site")).parts
    assert parts == ("x", *sources.values())


@pytest.mark.parametrize(
    "content, origin, problem",
    [
        (b"<p>one\n<p>\xff", "a.html:2", r"byte 10 \(0xff\) is not UTF-8 \[invalid_utf8\]"),
        (b"<p></p>", "a.html:1", r"no text \[empty_document\]"),
        (b"<img src='a.png'>", "a.html:1", r"no text beside its pictures \[empty_document\]"),
        (b"x<img src='http://[::1/a.png'>", "a.html:1", r"src of an image: .* \[wrong_fields\]"),
        (b"x<img src='data:image/png;base64,A'>", "a.html:1", r"src of an image: .* \[wrong_fields\]"),
        (b"x" * (MAX_PAGE_BYTES + 1), "a.html:1", r"has 8,388,609 bytes; 8,388,608 are the most \[too_large\]"),
    ],
)
def test_bad_pages(tmp_path: Path, content: bytes, origin: str, problem: str) -> None:
    file = tmp_path / "a.html"
    file.write_bytes(content)
    (record,) = read_records("interleaved", file)
    with pytest.raises(BadDocument, match=f"{origin}: .*{problem}"):
        parse_record("interleaved", record, USUAL)
