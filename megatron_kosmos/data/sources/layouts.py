"""The layouts of JSON objects and of rows: from named fields to texts and pictures in reading order.

Interleaved documents have ours (`parts`), that of MMC4 (https://github.com/allenai/mmc4), that of OBELICS
(arXiv 2306.16527, section 3), or a text with `<image>` where the pictures of a list go, as LLaVA's data have.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    Tag,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.data.errors import LeftOut
from megatron_kosmos.data.sources.input_format import InputFormat
from megatron_kosmos.prompt import IMAGE, SourceKind

T = TypeVar("T")
MISMATCH = "image_count"
"""The type of the error that a document with more markers than pictures is, or with fewer."""
Fields = str | Mapping[str, Any]
"""JSON's text, or values by name."""


class _Object(StrictModel):
    """Fields besides those we know are the user's own."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Picture(_Object):
    """A picture: a path, bytes, or Hugging Face's pair of `bytes` and `path`, of which bytes go first."""

    model_config = ConfigDict(extra="ignore", strict=True, validate_by_name=True)

    data: bytes | None = Field(default=None, validation_alias="bytes")
    path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_value(cls, value: Any) -> Any:
        match value:
            case str():
                return {"path": value}
            case bytes():
                return {"bytes": value}
            case {"path": str()} | {"bytes": bytes()} | {"data": bytes()}:
                return value
        raise ValueError("neither a path nor bytes")


class WebPicture(Picture):
    """One that a web page named: its path may not lead out of the folder of pictures."""


class Caption(_Object):
    """The text of a pair."""

    caption: str


class _Pair(Caption):
    image: Picture


class _Text(_Object):
    text: str


class _Download(_Object):
    """What img2dataset says of each pair."""

    status: str
    error_message: str | None


class _TextPart(StrictModel):
    text: str


class _ImagePart(StrictModel):
    image: str


class _Parts(_Object):
    parts: list[_TextPart | _ImagePart]

    def in_order(self) -> Iterator[str | Picture]:
        for part in self.parts:
            yield part.text if isinstance(part, _TextPart) else Picture(path=part.image)


class _MatchedImage(_Object):
    matched_text_index: NonNegativeInt
    image_name: str | None = None
    raw_url: str | None = None
    """Where it was, for images that have no name since they were not downloaded."""

    @model_validator(mode="after")
    def _it_is_named(self) -> "_MatchedImage":
        if not (self.image_name or self.raw_url):
            raise ValueError("neither image_name nor raw_url")
        return self


class _Mmc4(_Object):
    text_list: list[str]
    image_info: list[_MatchedImage]

    @model_validator(mode="after")
    def _texts_are_there(self) -> "_Mmc4":
        for number, image in enumerate(self.image_info):
            if image.matched_text_index >= len(self.text_list):
                where = f"image_info.{number}.matched_text_index"
                raise ValueError(f"{where} is {image.matched_text_index}, text_list has {len(self.text_list)} texts")
        return self

    def in_order(self) -> Iterator[str | Picture]:
        """Each image goes before the sentence that it matches."""
        images: dict[int, list[WebPicture]] = {}
        for image in self.image_info:
            picture = WebPicture(path=image.image_name or image.raw_url)
            images.setdefault(image.matched_text_index, []).append(picture)
        for number, text in enumerate(self.text_list):
            yield from images.get(number, ())
            yield text


class _Obelics(_Object):
    images: list[WebPicture | None]
    texts: list[str | None]

    @model_validator(mode="after")
    def _they_are_parallel(self) -> "_Obelics":
        if len(self.images) != len(self.texts):
            raise ValueError(
                f"{len(self.images)} images beside {len(self.texts)} texts; one of each pair should be null"
            )
        for number, (image, text) in enumerate(zip(self.images, self.texts, strict=True)):
            if (image is None) == (text is None):
                raise ValueError(f"images.{number} and texts.{number}: exactly one of them should be null")
        return self

    def in_order(self) -> Iterator[str | Picture]:
        for image, text in zip(self.images, self.texts, strict=True):
            part = text if image is None else image
            if part is not None:
                yield part


class _Marked(_Object):
    text: str
    images: list[Picture]

    @model_validator(mode="after")
    def _there_is_a_picture_for_each_marker(self) -> "_Marked":
        num_markers = self.text.count(IMAGE)
        if num_markers != len(self.images):
            raise PydanticCustomError(
                MISMATCH,
                "text has {num_markers} {marker}, images {num_images} pictures",
                {"num_markers": num_markers, "marker": IMAGE, "num_images": len(self.images)},
            )
        return self

    def in_order(self) -> Iterator[str | Picture]:
        first, *texts = self.text.split(IMAGE)
        yield first
        for image, text in zip(self.images, texts, strict=True):
            yield image
            yield text


LAYOUTS = {
    "parts": ("parts",),
    "mmc4": ("text_list", "image_info"),
    "obelics": ("images", "texts"),
    "marked": ("text", "images"),
}
"""The fields by which the layouts of interleaved documents are told apart."""
LAYOUT_FIELDS = ", or ".join(" and ".join(fields) for fields in LAYOUTS.values())
SEPARATORS = {_Parts: "", _Mmc4: " ", _Obelics: "\n\n", _Marked: ""}
"""What stands between texts that follow each other: sentences in MMC4, paragraphs in OBELICS."""


def _layout(fields: Any) -> str | None:
    found = fields if isinstance(fields, Mapping) else ()
    return next((name for name, needed in LAYOUTS.items() if set(needed).issubset(found)), None)


_INTERLEAVED: TypeAdapter[_Parts | _Mmc4 | _Obelics | _Marked] = TypeAdapter(
    Annotated[
        Annotated[_Parts, Tag("parts")]
        | Annotated[_Mmc4, Tag("mmc4")]
        | Annotated[_Obelics, Tag("obelics")]
        | Annotated[_Marked, Tag("marked")],
        Discriminator(
            _layout,
            custom_error_type="unknown_layout",
            custom_error_message=f"Input should be an object with {LAYOUT_FIELDS}",
        ),
    ]
)


def lay_out(kind: SourceKind, fields: Fields, names: InputFormat) -> Sequence[str | Picture]:
    """Return the texts and pictures of a document in reading order.

    Raises pydantic's ValidationError, and LeftOut for a pair that img2dataset did not get.
    """
    if kind == "text":
        return (_validate(_text_type(names), fields).text,)
    if kind == "interleaved":
        document = _validate(_INTERLEAVED, fields)
        return list(_joined(document.in_order(), SEPARATORS[type(document)]))
    try:
        pair = _validate(_pair_type(names), fields)
    except ValidationError:
        if not is_downloaded(fields):
            raise LeftOut("not_downloaded") from None
        raise
    return (pair.image, pair.caption)


def read_caption(text: str, names: InputFormat) -> str:
    """Return the caption of JSON beside a picture. Raises ValidationError."""
    return _validate(_caption_type(names), text).caption


def is_downloaded(fields: Fields) -> bool:
    """Return whether img2dataset got the picture of a pair; so be it where its marks are missing."""
    try:
        return _validate(_DOWNLOAD, fields).status == "success"
    except ValidationError:
        return True


def error_place(error: ValidationError) -> tuple[str, str, str]:
    """Return type, field (with dots, `""` for the whole) and message of the first problem."""
    problem = error.errors(include_url=False)[0]
    place = problem["loc"][1:] if problem["loc"][:1] and problem["loc"][0] in LAYOUTS else problem["loc"]
    return problem["type"], ".".join(map(str, place)), problem["msg"].removeprefix("Value error, ")


_DOWNLOAD: TypeAdapter[_Download] = TypeAdapter(_Download)


def _validate(adapter: TypeAdapter[T], fields: Fields) -> T:
    return adapter.validate_json(fields) if isinstance(fields, str) else adapter.validate_python(fields)


@cache
def _text_type(names: InputFormat) -> TypeAdapter[_Text]:
    return TypeAdapter(create_model("Text", __base__=_Text, text=(str, Field(alias=names.text_field))))


@cache
def _caption_type(names: InputFormat) -> TypeAdapter[Caption]:
    return TypeAdapter(create_model("Caption", __base__=Caption, caption=(str, Field(alias=names.caption_field))))


@cache
def _pair_type(names: InputFormat) -> TypeAdapter[_Pair]:
    image, caption = Field(alias=names.image_field), Field(alias=names.caption_field)
    return TypeAdapter(create_model("Pair", __base__=_Pair, image=(Picture, image), caption=(str, caption)))


def _joined(parts: Iterable[str | Picture], separator: str) -> Iterator[str | Picture]:
    """Yield `parts` with texts that follow each other made one, unless the separator is none."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str) and separator:
            texts.append(part)
            continue
        if texts:
            yield separator.join(texts)
            texts = []
        yield part
    if texts:
        yield separator.join(texts)
