"""The columns of a parquet file that hold documents of a kind."""

from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.sources.img2dataset import MARKS, is_listing
from megatron_kosmos.data.sources.input_format import InputFormat
from megatron_kosmos.data.sources.layouts import LAYOUT_FIELDS, LAYOUTS
from megatron_kosmos.prompt import SourceKind


def choose_columns(kind: SourceKind, file: Path, names: Collection[str], wanted: InputFormat) -> Sequence[str]:
    """Return which of the columns `names` of `file` to read. Raises DataError when there are none for the kind."""
    if kind == "interleaved":
        layout = next((fields for fields in LAYOUTS.values() if set(fields).issubset(names)), None)
        if layout is None:
            raise DataError(f"{file}: interleaved documents need the columns {LAYOUT_FIELDS}; it has {_list(names)}")
        return layout
    if kind == "text":
        return (_required(file, names, wanted.text_field, "--text-field"),)
    caption = _required(file, names, wanted.caption_field, "--caption-field")
    if wanted.image_field not in names and is_listing(names):
        return (caption, *MARKS)
    image = _required(file, names, wanted.image_field, "--image-field")
    return (caption, image, *(MARKS if is_listing(names) else ()))


def _required(file: Path, names: Collection[str], name: str, option: str) -> str:
    if name not in names:
        raise DataError(f"{file}: no column {name!r}; it has {_list(names)}; choose one with {option}")
    return name


def _list(names: Collection[str]) -> str:
    return ", ".join(names) or "none"
