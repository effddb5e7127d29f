"""What `kosmos preprocess` says of a corpus that it has made."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_kosmos.data.corpora.manifest import Manifest


def print_report(output: Path, manifest: "Manifest") -> None:
    """Print counts of what was written and left out, and how full sequences get."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from megatron_kosmos.data.corpora.manifest import QUARANTINE_SUFFIX, path_with

    console = Console(stderr=True)
    table = Table(title=Text(str(output)), title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_row("documents", f"{manifest.documents:,}")
    table.add_row("tokens", f"{manifest.tokens:,}")
    if manifest.kind != "text":
        table.add_row("images", f"{manifest.images:,}")
        table.add_row("most images in a document", f"{manifest.max_images_per_document:,}")
    for what, counts in (
        ("documents skipped", manifest.skipped),
        ("documents filtered out", manifest.filtered),
        ("images dropped", manifest.dropped_images),
    ):
        for reason, count in counts.items():
            table.add_row(f"{what}: {reason}", f"{count:,}")
    for packing, summary in manifest.packing.items():
        figures = f"{summary.efficiency:.2%} filled, {summary.documents_cut:,} documents cut"
        table.add_row(f"sequences packed by {packing}", f"{summary.rows:,}, {figures}")
    table.add_row("bytes written", f"{sum(record.bytes for record in manifest.files.values()):,}")
    console.print(table)
    if manifest.skipped:
        listed = path_with(output, QUARANTINE_SUFFIX)
        console.print(f"skipped documents are listed in {listed}", markup=False, soft_wrap=True)
