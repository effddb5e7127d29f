"""A made-up corpus in the real file format with documents as long as web pages are, and what memory a process has."""

from pathlib import Path

import numpy as np

from megatron_kosmos.data.corpora.indexed import HEADER, MAGIC, VERSION
from megatron_kosmos.data.corpora.manifest import FileRecord, Manifest, PreparationSettings, as_file, path_with
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer


def anonymous_kilobytes() -> int:
    """Return the memory of this process that is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def write_lognormal(prefix: Path, num_documents: int, tokenizer: KosmosTokenizer) -> None:
    """Write a corpus whose index is real and whose tokens are a hole in a file, which takes no room."""
    lengths = np.random.default_rng(0).lognormal(5.6, 1.1, num_documents).astype("<i4").clip(4, 1 << 17)
    offsets = np.zeros(num_documents, dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    num_tokens = int(lengths.sum(dtype=np.int64))
    with path_with(prefix, ".idx").open("wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, 8, num_documents, num_documents + 1))
        for array in (lengths, offsets * 2, np.arange(num_documents + 1, dtype="<i8")):
            array.tofile(index)
    with path_with(prefix, ".bin").open("wb") as tokens:
        tokens.truncate(2 * num_tokens)
    files = {
        path.name: FileRecord(bytes=path.stat().st_size, sha256="made up")
        for path in (path_with(prefix, ".bin"), path_with(prefix, ".idx"))
    }
    manifest = Manifest(
        kind="text",
        documents=num_documents,
        tokens=num_tokens,
        images=0,
        max_images_per_document=0,
        skipped={},
        filtered={},
        dropped_images={},
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=(),
        settings=PreparationSettings(filters=Filters(), row_format=RowFormat(), max_shard_bytes=1),
        files=files,
    )
    path_with(prefix, ".manifest.json").write_bytes(as_file(manifest))
