"""The three kinds of source document and their readers: text, image-caption pairs, interleaved pages.

Reading has two steps, so that worker processes can share the second: `read_records` cuts a file into raw records,
`parse_record` makes a `Document` of one or says, with file and line, what is wrong with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.webdataset_tars import Sample, read_tar
from megatron_kosmos.prompt import SourceKind

SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "text": (".jsonl", ".txt"),
    "caption": (".jsonl", ".tar"),
    "interleaved": (".jsonl",),
}
"""What an input file of each kind may be."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")


@dataclass(frozen=True)
class ImageReference:
    """A picture of a document: a file, or bytes that came with the document."""

    name: str
    source: Path | bytes

    def read(self) -> bytes:
        """Return the encoded picture. Raises OSError when its file cannot be read."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Document:
    """Texts and pictures in reading order; captions are one picture and one text."""

    parts: tuple[str | ImageReference, ...]
    origin: str
    """`file:line`, or `file.tar:member`."""


@dataclass(frozen=True)
class RawRecord:
    """One document as it lies in its file, not looked into yet."""

    file: Path
    place: str
    """Line number, or name of the member of a tar."""
    content: bytes | Sample

    @property
    def origin(self) -> str:
        """Where a person finds it."""
        return f"{self.file}:{self.place}"

    @property
    def num_bytes(self) -> int:
        """Bytes that it has in its file."""
        if isinstance(self.content, Sample):
            return sum(map(len, self.content.members.values()))
        return len(self.content)


class _Line(StrictModel):
    """A line of JSON: fields besides ours are the user's own."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _TextLine(_Line):
    text: str


class _CaptionLine(_Line):
    image: str
    caption: str


class _TarCaption(_Line):
    caption: str


class _TextPart(StrictModel):
    text: str


class _ImagePart(StrictModel):
    image: str


class _InterleavedLine(_Line):
    parts: list[_TextPart | _ImagePart]


_LINES: dict[SourceKind, TypeAdapter[_TextLine] | TypeAdapter[_CaptionLine] | TypeAdapter[_InterleavedLine]] = {
    "text": TypeAdapter(_TextLine),
    "caption": TypeAdapter(_CaptionLine),
    "interleaved": TypeAdapter(_InterleavedLine),
}


def check_input(kind: SourceKind, file: Path) -> None:
    """Raise DataError unless `file` exists and its name fits `kind`."""
    if not file.is_file():
        raise DataError(f"no input file at {file}")
    if file.suffix not in SUFFIXES[kind]:
        raise DataError(f"{file}: {kind} documents come in {' or '.join(SUFFIXES[kind])} files, not {file.suffix!r}")


def read_records(kind: SourceKind, file: Path) -> Iterator[RawRecord]:
    """Yield the raw documents of `file` in order: lines, members of a tar, or the whole of a .txt.

    Lines of white space alone are no documents. Raises DataError for a file of another kind or a damaged tar.
    """
    check_input(kind, file)
    if file.suffix == ".txt":
        yield RawRecord(file, "1", file.read_bytes())
    elif file.suffix == ".tar":
        for sample in read_tar(file):
            yield RawRecord(file, sample.key, sample)
    else:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield RawRecord(file, str(number), line)


def parse_record(kind: SourceKind, record: RawRecord) -> Document:
    """Return the document of `record`. Raises BadDocument; pictures are referred to, not read."""
    if isinstance(record.content, Sample):
        parts = _parse_sample(record, record.content)
    elif record.file.suffix == ".txt":
        parts = (_decode(record, record.content),)
    else:
        parts = _parse_line(kind, record, record.content)
    if not any(isinstance(part, str) and part.strip() for part in parts):
        what = "no text beside its pictures" if any(isinstance(part, ImageReference) for part in parts) else "no text"
        raise BadDocument(record.origin, "empty_document", f"the document has {what}")
    return Document(parts, record.origin)


def read_texts(file: Path) -> Iterator[str]:
    """Yield the texts of a file of text documents. Raises DataError for the first one that cannot be used."""
    for record in read_records("text", file):
        yield from (part for part in parse_record("text", record).parts if isinstance(part, str))


def _parse_line(kind: SourceKind, record: RawRecord, content: bytes) -> tuple[str | ImageReference, ...]:
    text = _decode(record, content.rstrip(b"\r\n"))
    try:
        line = _LINES[kind].validate_json(text)
    except ValidationError as error:
        raise _bad_json(record, error) from error
    if isinstance(line, _TextLine):
        return (line.text,)
    if isinstance(line, _CaptionLine):
        return (_refer(record, line.image), line.caption)
    return tuple(part.text if isinstance(part, _TextPart) else _refer(record, part.image) for part in line.parts)


def _parse_sample(record: RawRecord, sample: Sample) -> tuple[str | ImageReference, ...]:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
    texts = [extension for extension in TEXT_EXTENSIONS if extension in sample.members]
    found = ", ".join(f"{sample.key}.{extension}" for extension in sample.members)
    if not images:
        raise BadDocument(record.origin, "missing_image", f"the tar has no picture of it, only {found}")
    if not texts:
        raise BadDocument(record.origin, "missing_caption", f"the tar has no .txt or .json of it, only {found}")
    if len(images) > 1:
        raise BadDocument(record.origin, "wrong_fields", f"one caption, but several pictures: {found}")
    caption = _decode(record, sample.members[texts[0]])
    if texts[0] == "json":
        try:
            caption = _TarCaption.model_validate_json(caption).caption
        except ValidationError as error:
            raise _bad_json(record, error) from error
    return (ImageReference(f"{sample.key}.{images[0]}", sample.members[images[0]]), caption)


def _refer(record: RawRecord, name: str) -> ImageReference:
    path = record.file.parent / name
    if not path.is_file():
        raise BadDocument(record.origin, "missing_image", f"there is no picture at {path}")
    return ImageReference(name, path)


def _decode(record: RawRecord, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        origin = f"{record.file}:{line}" if record.file.suffix == ".txt" else record.origin
        raise BadDocument(
            origin, "invalid_utf8", f"byte {error.start} ({content[error.start]:#04x}) is not UTF-8"
        ) from error


def _bad_json(record: RawRecord, error: ValidationError) -> BadDocument:
    problem = error.errors(include_url=False)[0]
    reason = "invalid_json" if problem["type"] == "json_invalid" else "wrong_fields"
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].replace("at line 1 column", "at column")  # the line of the file is in the origin
    return BadDocument(record.origin, reason, f"{field}: {message}" if field else message)
