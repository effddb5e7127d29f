"""A pool of processes that encode chunks of records, with results in order and a bounded number under way."""

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

from megatron_kosmos.data.documents import read_records
from megatron_kosmos.data.encoding import EncodedChunk, Encoder, EncoderSettings
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.input_format import InputFormat
from megatron_kosmos.data.readers.records import RawRecord
from megatron_kosmos.prompt import SourceKind

MAX_RECORDS: dict[SourceKind, int] = {"text": 256, "caption": 32, "interleaved": 32}
"""Records of a chunk: enough to make the way to another process cheap, few where pictures travel back."""
MAX_BYTES = 8 << 20
"""A chunk ends once its records take as many bytes in memory."""
CHUNKS_UNDER_WAY = 3
"""Per worker: what is read ahead stays bounded when writing is slower than encoding."""


def encode_files(
    settings: EncoderSettings, files: Iterable[Path], num_workers: int
) -> Generator[tuple[EncodedChunk, int]]:
    """Yield the encoded chunks of `files` in order, each with the bytes of its files that it took. Raises DataError."""
    chunks = _chunks(settings.kind, files, settings.input_format)
    if num_workers <= 1:
        encoder = Encoder(settings)
        for records, num_bytes in chunks:
            yield encoder.encode_chunk(records), num_bytes
        return
    # A server that forks workers, not a fork of this process: the thread of a progress bar would not survive that.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("forkserver"))
    under_way: deque[tuple[Future[EncodedChunk], int]] = deque()
    try:
        for records, in_files in chunks:
            under_way.append((pool.submit(_encode, settings, records), in_files))
            if len(under_way) >= CHUNKS_UNDER_WAY * num_workers:
                future, num_bytes = under_way.popleft()
                yield future.result(), num_bytes
        while under_way:
            future, num_bytes = under_way.popleft()
            yield future.result(), num_bytes
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, most likely for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(
    kind: SourceKind, files: Iterable[Path], input_format: InputFormat
) -> Iterator[tuple[list[RawRecord], int]]:
    chunk: list[RawRecord] = []
    in_memory, in_files = 0, 0
    for file in files:
        offset = 0
        for record in read_records(kind, file, input_format):
            chunk.append(record)
            in_memory += record.num_bytes
            in_files += record.offset - offset
            offset = record.offset
            if len(chunk) >= MAX_RECORDS[kind] or in_memory >= MAX_BYTES:
                yield chunk, in_files
                chunk, in_memory, in_files = [], 0, 0
    if chunk:
        yield chunk, in_files


def _encode(settings: EncoderSettings, records: list[RawRecord]) -> EncodedChunk:
    return _encoder(settings).encode_chunk(records)


@cache
def _encoder(settings: EncoderSettings) -> Encoder:
    return Encoder(settings)
