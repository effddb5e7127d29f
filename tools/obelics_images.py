"""`python tools/obelics_images.py addresses|paths …`: OBELICS with pictures that img2dataset downloaded (docs/data.md).

OBELICS names its pictures by address. `addresses` lists them for img2dataset; `paths` writes the shards again with the
paths of those that were downloaded, relative to the folder of the downloads.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import pyarrow
import typer
from pyarrow import parquet

Shards = Annotated[list[Path], typer.Argument(help="Parquet files of OBELICS.")]
ROWS = 4096
"""Documents in memory at a time."""


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(addresses)
    app.command()(paths)


def addresses(shards: Shards, *, output: Annotated[Path, typer.Option(help="Parquet file to write.")]) -> None:
    """List the pictures' addresses, each once, in a column url."""
    urls: dict[str, None] = {}
    for shard in shards:
        for batch in _batches(shard, ["images"]):
            urls.update((url, None) for row in batch.to_pylist() for url in row["images"] if url is not None)
    parquet.write_table(pyarrow.table({"url": pyarrow.array(list(urls), pyarrow.string())}), output)
    typer.echo(f"{len(urls):,} addresses in {output}")


def paths(
    shards: Shards,
    *,
    downloads: Annotated[Path, typer.Option(help="Folder that img2dataset wrote, format files.")],
    output: Annotated[Path, typer.Option(help="Folder for the new shards.")],
) -> None:
    """Write the shards with paths instead of the addresses of the pictures that were downloaded."""
    found = _downloaded(downloads)
    output.mkdir(parents=True, exist_ok=True)
    num_images = num_found = 0
    for shard in shards:
        schema = pyarrow.schema(
            [("images", pyarrow.list_(pyarrow.string())), ("texts", pyarrow.list_(pyarrow.string()))]
        )
        with parquet.ParquetWriter(output / shard.name, schema) as writer:
            for batch in _batches(shard, ["images", "texts"]):
                rows = batch.to_pylist()
                urls = [url for row in rows for url in row["images"] if url is not None]
                num_images += len(urls)
                num_found += sum(url in found for url in urls)
                for row in rows:
                    row["images"] = [url and found.get(url, url) for url in row["images"]]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    typer.echo(f"{num_found:,} of {num_images:,} pictures are in {downloads}; the shards are in {output}")


def _batches(shard: Path, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    with parquet.ParquetFile(shard) as table:
        yield from table.iter_batches(ROWS, columns=list(columns))


def _downloaded(folder: Path) -> dict[str, str]:
    """Return the path below `folder` of each picture that is there, by address."""
    found = {}
    for listing in sorted(folder.glob("*.parquet")):
        for row in parquet.read_table(listing, columns=["url", "key", "status"]).to_pylist():
            if row["status"] == "success":
                found[row["url"]] = f"{listing.stem}/{row['key']}.jpg"
    if not found:
        raise typer.BadParameter(f"no picture in {folder}: it should hold 00000.parquet and 00000/*.jpg, and so on")
    return found


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    register(app)
    app()
