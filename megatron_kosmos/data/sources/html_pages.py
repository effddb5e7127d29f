"""HTML pages as texts and pictures in reading order.

lxml, not the standard library's html.parser: that one takes quadratic time for some damaged pages and raises
AssertionError for others.
"""

import re
from collections.abc import Mapping

MAX_PAGE_BYTES = 8 << 20
"""libxml2 drops texts of more than 10 MB in silence."""

NOT_READ = frozenset({"script", "style", "title", "template", "noscript", "svg", "iframe", "object"})
"""Elements whose content is not text to read."""
# fmt: off
LINES = frozenset({
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "dialog", "div",
    "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header",
    "hr", "legend", "li", "main", "menu", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot",
    "thead", "tr", "ul",
})
# fmt: on
"""Elements that begin and end lines."""
CELLS = frozenset({"td", "th"})
_WHITE_SPACE = re.compile(r"[ \t\r\n\f]+")


class PictureSource(str):
    """The `src` of a picture, as the page has it."""


def parse_page(page: str) -> list[str | PictureSource]:
    """Return the texts of an HTML page, those of white space alone left out, and the `src` of pictures between them.

    Block elements and `<br>` become newlines, other white space collapses, except in `<pre>`.
    """
    from lxml import etree

    if not page.strip():
        return []
    parser = etree.HTMLParser(target=_Page(), encoding="utf-8")
    parts: list[str | PictureSource] = etree.fromstring(page.encode(), parser)
    return parts


class _Page:
    """What lxml calls as it reads: `start`, `end` and `data` for each element and text, `close` at the end."""

    def __init__(self) -> None:
        self._parts: list[str | PictureSource] = []
        self._fragments: list[str] = []
        self._at_line_start = True
        self._num_unread = self._num_preformatted = 0
        """Elements around the current place whose content is not read, or keeps its white space."""

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag in NOT_READ:
            self._num_unread += 1
        if self._num_unread:
            return
        self._separate(tag)
        if tag == "pre":
            self._num_preformatted += 1
        source = attributes.get("src", "").strip() if tag == "img" else ""
        if source:
            self._end_text()
            self._parts.append(PictureSource(source))
            self._at_line_start = False

    def end(self, tag: str) -> None:
        if tag in NOT_READ:
            self._num_unread -= 1
        elif not self._num_unread:
            if tag == "pre":
                self._num_preformatted -= 1
            if tag != "br":  # its start has begun a line
                self._separate(tag)

    def data(self, text: str) -> None:
        if self._num_unread:
            return
        if not self._num_preformatted:
            text = _WHITE_SPACE.sub(" ", text)
            if self._at_line_start or (self._fragments and self._fragments[-1].endswith(" ")):
                text = text.removeprefix(" ")
        if text:
            self._fragments.append(text)
            self._at_line_start = text.endswith("\n")

    def close(self) -> list[str | PictureSource]:
        self._end_text()
        if self._parts and not isinstance(self._parts[-1], PictureSource):
            self._parts[-1] = self._parts[-1].rstrip()
        return self._parts

    def _separate(self, tag: str) -> None:
        if tag in CELLS:
            self.data(" ")
        elif tag in LINES and not self._at_line_start:
            if self._fragments:
                self._fragments[-1] = self._fragments[-1].rstrip(" ")
            self._fragments.append("\n")
            self._at_line_start = True

    def _end_text(self) -> None:
        text = "".join(self._fragments)
        if text.strip():
            self._parts.append(text)
        self._fragments.clear()
