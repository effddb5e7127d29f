"""What img2dataset writes (https://github.com/rom1504/img2dataset): shards, each with a parquet file that lists it.

`00000.parquet` lies beside `00000.tar` (its format webdataset) or the folder `00000` (files), or holds the pictures
itself (parquet). It lists the pairs that could not be downloaded too.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.sources.layouts import is_downloaded
from megatron_kosmos.data.sources.readers.parquet import read_rows
from megatron_kosmos.data.sources.readers.records import RawRecord, Row

MARKS = ("key", "status", "error_message")
"""Columns that every such list has."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def is_listing(names: Collection[str]) -> bool:
    """Return whether a parquet file with these columns is such a list."""
    return set(MARKS).issubset(names)


def failed_downloads(tar: Path) -> Iterator[RawRecord]:
    """Yield the rows of the list beside `tar`, if there is one, of pairs that are not in it. Raises DamagedFile."""
    listing, end = tar.with_suffix(".parquet"), tar.stat().st_size
    if not listing.is_file():
        return

    def marks(names: Collection[str]) -> tuple[str, ...]:
        return MARKS if is_listing(names) else ()

    for record in read_rows(listing, marks):
        if isinstance(record.content, Row) and not is_downloaded(record.content.values):
            yield record._replace(offset=end)


def with_picture(record: RawRecord, image_field: str) -> RawRecord:
    """Return the row of a list with the path of its picture in the folder beside the list.

    Rows that have their picture already, or never got one, stay as they are. Raises DataError without such a folder.
    """
    row, folder = record.content, record.file.with_suffix("")
    if not isinstance(row, Row) or image_field in row.values or not is_downloaded(row.values):
        return record
    if not folder.is_dir():
        tar = record.file.with_suffix(".tar")
        advice = f"give --input {tar}" if tar.is_file() else "choose their column with --image-field"
        raise DataError(f"{record.file} lists pairs of img2dataset, but holds no pictures; {advice}")
    pictures = [folder / f"{row.values['key']}.{extension}" for extension in IMAGE_EXTENSIONS]
    picture = next((path for path in pictures if path.is_file()), pictures[0])
    return record._replace(content=replace(row, values={**row.values, image_field: str(picture.resolve())}))
