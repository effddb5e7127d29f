"""The three kinds of source document: text, image-caption pairs, interleaved pages.

Reading has two steps, so that worker processes can share the second: `read_records` cuts a file into raw records,
`parse_record` makes a `Document` of one or says, with file and line, what is wrong with it.
"""

import base64
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pydantic import ValidationError
from pydantic_core import from_json

from megatron_kosmos.data.errors import BadDocument, DataError, UnusableImage
from megatron_kosmos.data.sources.columns import choose_columns
from megatron_kosmos.data.sources.html_pages import MAX_PAGE_BYTES, PictureSource, parse_page
from megatron_kosmos.data.sources.image_reference import ImageReference
from megatron_kosmos.data.sources.img2dataset import IMAGE_EXTENSIONS, failed_downloads, with_picture
from megatron_kosmos.data.sources.input_format import USUAL, InputFormat
from megatron_kosmos.data.sources.layouts import (
    MISMATCH,
    Fields,
    Picture,
    WebPicture,
    error_place,
    lay_out,
    read_caption,
)
from megatron_kosmos.data.sources.readers.parquet import read_rows
from megatron_kosmos.data.sources.readers.records import (
    DamagedFile,
    Lines,
    RawRecord,
    Row,
    Sample,
    Unreadable,
)
from megatron_kosmos.data.sources.readers.streams import format_suffix, read_lines, read_whole
from megatron_kosmos.data.sources.readers.tars import read_tar
from megatron_kosmos.prompt import SourceKind

SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "text": (".jsonl", ".json", ".txt", ".parquet"),
    "caption": (".jsonl", ".json", ".tsv", ".tar", ".parquet"),
    "interleaved": (".jsonl", ".json", ".html", ".htm", ".parquet"),
}
"""What an input file of each kind may be; .json holds lines of JSON too, as in C4."""
JSON_LINES = (".jsonl", ".json")
CONTAINERS = (".tar", ".parquet")
"""Those that have no .gz or .zst behind their suffix."""
BLOCK_BYTES: dict[SourceKind, int] = {"text": 1 << 18, "caption": 1 << 12, "interleaved": 1 << 14}
"""Lines that go to a worker process together: enough to make the way cheap, few where pictures travel back."""
TEXT_EXTENSIONS = ("txt", "json")
REASONS = {"json_invalid": "invalid_json", MISMATCH: MISMATCH}
"""What bad documents count as whose fields have these errors; others have wrong fields."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Document:
    """Texts and pictures in reading order; captions are one picture and one text."""

    parts: tuple[str | ImageReference, ...]
    origin: str
    """`file:line`, `file.parquet:row N`, or `file.tar:key`."""


def check_input(kind: SourceKind, file: Path) -> None:
    """Raise DataError unless `file` exists and its name fits `kind`."""
    try:
        str(file).encode()
        is_file = S_ISREG(file.stat().st_mode)
    except UnicodeEncodeError as error:  # the manifest, in UTF-8, names it
        raise DataError(f"{str(file)!r}: the name of an input file should be UTF-8; rename it") from error
    except OSError as error:
        raise DataError(f"no input file at {file}: {error.strerror}") from error
    except ValueError as error:  # a NUL
        raise DataError(f"no input file at {str(file)!r}: {error}") from error
    if not is_file:
        raise DataError(f"no input file at {file}, but a folder, device or pipe")
    suffix, suffixes = format_suffix(file), SUFFIXES[kind]
    if suffix not in suffixes or (suffix in CONTAINERS and file.suffix != suffix):
        legal = [name if name in CONTAINERS else f"{name}[.gz|.zst]" for name in suffixes]
        raise DataError(f"{file}: {kind} documents come in {' or '.join(legal)} files, not {file.name!r}")


def read_records(kind: SourceKind, file: Path, names: InputFormat = USUAL) -> Iterator[RawRecord]:
    """Yield the raw documents of `file` in order: lines, rows, members of a tar, or a whole file.

    Lines of white space alone are no documents. Otherwise as `read_blocks`.
    """
    for block in read_blocks(kind, file, BLOCK_BYTES[kind], names):
        yield from block.each()


def read_blocks(kind: SourceKind, file: Path, block_bytes: int, names: InputFormat = USUAL) -> Iterator[RawRecord]:
    """Yield the raw documents of `file` in order, but lines in blocks of about `block_bytes`.

    A damaged file ends with a record that says so. Raises DataError for a file of another kind, without the fields that
    are needed, or that cannot be opened.
    """
    check_input(kind, file)
    try:
        yield from _read(kind, file, block_bytes, names)
    except DamagedFile as damage:
        yield RawRecord(damage.file, damage.place, Unreadable("damaged_file", damage.detail), file.stat().st_size)
    except OSError as error:
        raise DataError(f"{error.filename or file} cannot be opened: {error.strerror or error}") from error


def parse_record(kind: SourceKind, record: RawRecord, names: InputFormat = USUAL) -> Document:
    """Return the document of `record`; pictures are referred to, not read.

    Raises BadDocument, and LeftOut for what its own source marks as one without content.
    """
    parts = tuple(_RecordParser(kind, record, names).parts())
    if not any(isinstance(part, str) and part.strip() for part in parts):
        what = "no text beside its pictures" if any(isinstance(part, ImageReference) for part in parts) else "no text"
        raise BadDocument(record.origin, "empty_document", f"the document has {what}")
    return Document(parts, record.origin)


def parse_text(record: RawRecord, names: InputFormat = USUAL) -> str:
    """Return the text of a record of a text document, as `parse_record` does, in a quarter of the time for JSON.

    Raises BadDocument.
    """
    if isinstance(record.content, bytes) and format_suffix(record.file) in JSON_LINES:
        try:
            fields = from_json(record.content, cache_strings="keys")
        except ValueError:
            fields = None  # the other way says what is wrong
        text = fields.get(names.text_field) if isinstance(fields, dict) else None
        if isinstance(text, str) and text and not text.isspace():
            return text
    (text,) = parse_record("text", record, names).parts
    return str(text)


def parse_texts(block: RawRecord, names: InputFormat = USUAL) -> list[str] | None:
    """Return the texts of a block of lines of JSON, faster than `parse_text` one by one.

    None for other records, and for lines of which one has none: `parse_text` says why.
    """
    if not isinstance(block.content, Lines) or format_suffix(block.file) not in JSON_LINES:
        return None
    lines, field = io.BytesIO(block.content.data), names.text_field
    try:
        texts = [from_json(line, cache_strings="keys")[field] for line in lines if not line.isspace()]
    except (ValueError, TypeError, LookupError):
        return None
    return texts if {*map(type, texts)} <= {str} and all(texts) and not any(map(str.isspace, texts)) else None


def read_texts(file: Path, names: InputFormat = USUAL) -> Iterator[str]:
    """Yield the texts of a file of text documents. Raises DataError for the first one that cannot be used."""
    for record in read_records("text", file, names):
        yield parse_text(record, names)


def _read(kind: SourceKind, file: Path, block_bytes: int, names: InputFormat) -> Iterator[RawRecord]:
    match format_suffix(file):
        case ".txt":
            yield from read_whole(file)
        case ".html" | ".htm":
            yield from read_whole(file, MAX_PAGE_BYTES)
        case ".tar":
            yield from read_tar(file)
            yield from failed_downloads(file)
        case ".parquet":
            for record in read_rows(file, lambda columns: choose_columns(kind, file, columns, names)):
                yield with_picture(record, names.image_field) if kind == "caption" else record
        case _:
            yield from read_lines(file, block_bytes)


class _RecordParser:
    """Takes one record apart."""

    def __init__(self, kind: SourceKind, record: RawRecord, names: InputFormat) -> None:
        self._kind, self._record, self._names = kind, record, names

    def parts(self) -> Sequence[str | ImageReference]:
        content = self._record.content
        assert not isinstance(content, Lines), "a block of lines is many documents: RawRecord.each"
        if isinstance(content, Unreadable):
            raise self._bad(content.reason, content.detail)
        if isinstance(content, Sample):
            return self._parse_sample(content)
        if isinstance(content, Row):
            return self._lay_out(content.values)
        match format_suffix(self._record.file):
            case ".txt":
                return (self._decode(content),)
            case ".html" | ".htm":
                parts = parse_page(self._decode(content))
                return [self._refer_to_source(part) if isinstance(part, PictureSource) else part for part in parts]
            case ".tsv":
                return self._parse_pair(self._decode(content.rstrip(b"\r\n")))
        return self._lay_out(self._decode(content.rstrip(b"\r\n")))

    def _lay_out(self, fields: Fields) -> Sequence[str | ImageReference]:
        try:
            parts = lay_out(self._kind, fields, self._names)
        except ValidationError as error:
            raise self._bad_fields(error) from error
        return [self._refer(part) if isinstance(part, Picture) else part for part in parts]

    def _parse_pair(self, line: str) -> Sequence[str | ImageReference]:
        fields = line.split("\t")
        if len(fields) != 2:
            raise self._bad("wrong_fields", f"caption<tab>path are 2 fields, not {len(fields)}")
        return (self._refer(Picture(path=fields[1])), fields[0])

    def _parse_sample(self, sample: Sample) -> Sequence[str | ImageReference]:
        found = ", ".join(f"{sample.key}.{extension}" for extension in sample.members)
        images = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
        wanted = TEXT_EXTENSIONS if self._names.caption_field == USUAL.caption_field else ("json",)
        texts = [extension for extension in wanted if extension in sample.members]
        if not images:
            raise self._bad("missing_image", f"the tar has no picture of it, only {found}")
        if not texts:
            raise self._bad("missing_caption", f"the tar has no .{' or .'.join(wanted)} of it, only {found}")
        if len(images) > 1:
            raise self._bad("wrong_fields", f"one caption, but several pictures: {found}")
        caption = self._decode(sample.members[texts[0]])
        if texts[0] == "json":
            try:
                caption = read_caption(caption, self._names)
            except ValidationError as error:
                raise self._bad_fields(error) from error
        return (ImageReference(f"{sample.key}.{images[0]}", sample.members[images[0]]), caption)

    def _refer(self, picture: Picture) -> ImageReference:
        if picture.data is not None:
            return ImageReference(picture.path or "the picture", picture.data)
        name = picture.path or ""
        if _URL.match(name):
            return ImageReference(name, None)
        if isinstance(picture, WebPicture):
            return self._refer_below(self._folder, name)
        return ImageReference(name, self._folder / name)

    @property
    def _folder(self) -> Path:
        return self._names.image_folder or self._record.file.parent

    def _refer_below(self, base: Path, name: str) -> ImageReference:
        """Return the picture `name`, seen from `base`, unless it leads out of the folder of pictures."""
        path, folder = Path(os.path.abspath(base / name)), os.path.abspath(self._folder)
        if not path.is_relative_to(folder):
            detail = (
                f"{name} leads out of {self._folder}; a web page gets pictures of this folder only (--image-folder)"
            )
            return ImageReference(name, UnusableImage("missing_image", detail))
        return ImageReference(name, path)

    def _refer_to_source(self, source: str) -> ImageReference:
        """Return the picture of an `<img src>`: a path in an address's notation, an address, or data."""
        try:
            address = urlsplit(source)
            if address.scheme == "data":
                declaration, _, data = address.path.partition(",")
                raw = unquote_to_bytes(data)
                return ImageReference("data:", base64.b64decode(raw) if declaration.endswith(";base64") else raw)
        except ValueError as error:
            raise self._bad("wrong_fields", f"src of an image: {error}") from error
        if address.scheme or address.netloc:
            return ImageReference(source, None)
        # As in a browser, with the folder of pictures as the root of the site.
        path, page_folder = unquote(address.path), self._record.file.parent
        is_in_site = Path(os.path.abspath(page_folder)).is_relative_to(os.path.abspath(self._folder))
        return self._refer_below(
            page_folder if is_in_site and not path.startswith("/") else self._folder, path.lstrip("/")
        )

    def _decode(self, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            record, problem = self._record, f"byte {error.start} ({content[error.start]:#04x}) is not UTF-8"
            if format_suffix(record.file) not in (".txt", ".html", ".htm"):
                raise self._bad("invalid_utf8", problem) from error
            line = content.count(b"\n", 0, error.start) + 1
            raise BadDocument(f"{record.file}:{line}", "invalid_utf8", problem) from error

    def _bad_fields(self, error: ValidationError) -> BadDocument:
        kind, field, message = error_place(error)
        message = message.replace("at line 1 column", "at column")  # the line of the file is in the origin
        reason = REASONS.get(kind, "wrong_fields")
        return self._bad(reason, f"{field}: {message}" if field else message)

    def _bad(self, reason: str, detail: str) -> BadDocument:
        return BadDocument(self._record.origin, reason, detail)
