"""The reader of parquet files: the wanted columns, a few rows at a time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_kosmos.data.sources.readers.records import (
    MAX_RECORD_BYTES,
    DamagedFile,
    RawRecord,
    Row,
    Unreadable,
    too_large,
)

BATCH_BYTES = 8 << 20
MAX_BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20


def read_rows(file: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[RawRecord]:
    """Yield the rows of `file`, with the columns that `choose` picks from the names of all. Raises DamagedFile."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    done, size = 0, file.stat().st_size
    try:
        with ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True) as table:
            columns = choose(table.schema_arrow.names)
            for batch in table.iter_batches(_batch_rows(table.metadata), columns=list(columns), use_threads=False):
                for content in _rows(batch):
                    done += 1
                    yield RawRecord(file, f"row {done}", content, size * done // table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFile(file, f"row {done + 1}", f"the parquet file cannot be read from here on: {error}") from error


def _batch_rows(metadata: Any) -> int:
    """Return how many rows have about BATCH_BYTES."""
    num_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return int(max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(1, num_bytes))))


def _rows(batch: Any) -> Iterator[Row | Unreadable]:
    num_bytes = batch.nbytes
    if num_bytes <= MAX_RECORD_BYTES:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            pass  # in one of the rows: which, is found below
        else:
            yield from (Row(values, num_bytes // len(rows)) for values in rows)
            return
    for number in range(batch.num_rows):
        yield _row(batch.slice(number, 1))


def _row(batch: Any) -> Row | Unreadable:
    if batch.nbytes > MAX_RECORD_BYTES:
        return too_large(batch.nbytes, MAX_RECORD_BYTES, "the row")
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            (values[name],) = column.to_pylist()
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} ({error.object[error.start]:#04x})"
            return Unreadable("invalid_utf8", f"column {name}: {byte} is not UTF-8")
    return Row(values, batch.nbytes)
