"""A pool of processes that encode chunks of records, with results in order and a bounded number under way."""

import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.preparation.encoding import EncodedChunk, Encoder, EncoderSettings
from megatron_kosmos.data.preparation.part_plan import PlacedRecord
from megatron_kosmos.data.sources.readers.records import Lines, RawRecord
from megatron_kosmos.prompt import SourceKind

MAX_RECORDS: dict[SourceKind, int] = {"text": 256, "caption": 32, "interleaved": 32}
"""Records of a chunk: enough to make the way to another process cheap, few where pictures travel back. A block of lines
ends a chunk, too."""
MAX_BYTES = 8 << 20
"""A chunk ends once its records take as many bytes in memory."""
GC_THRESHOLD = 100_000
"""Lists at which a worker looks for cycles. A chunk has thousands of them, of ids, and none of these is garbage."""
CHUNKS_UNDER_WAY = 3
"""Per worker: what is read ahead stays bounded when writing is slower than encoding."""


@dataclass(frozen=True)
class PlacedChunk:
    """An encoded chunk, all of one part."""

    encoded: EncodedChunk
    part: int
    end: int
    """Bytes of all inputs up to the end of its last record."""


@dataclass(frozen=True)
class _Chunk:
    records: list[RawRecord]
    part: int
    end: int


def encode_records(
    settings: EncoderSettings, records: Iterator[PlacedRecord], num_workers: int
) -> Generator[PlacedChunk]:
    """Yield the encoded chunks of `records` in order. Raises DataError after all that was read before."""
    chunks = _chunks(settings.kind, records)
    if num_workers <= 1:
        encoder = Encoder(settings)
        for chunk in chunks:
            yield PlacedChunk(encoder.encode_chunk(chunk.records), chunk.part, chunk.end)
        return
    # A server that forks workers, not a fork of this process: the thread of a progress bar would not survive that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # what workers import, imported once
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker)
    under_way: deque[tuple[Future[EncodedChunk], _Chunk]] = deque()

    def next_result() -> PlacedChunk:
        future, chunk = under_way.popleft()
        return PlacedChunk(future.result(), chunk.part, chunk.end)

    problem: DataError | None = None
    try:
        try:
            for chunk in chunks:
                under_way.append((pool.submit(_encode, settings, tuple(zip(*chunk.records, strict=True))), chunk))
                if len(under_way) >= CHUNKS_UNDER_WAY * num_workers:
                    yield next_result()
        except DataError as error:
            problem = error  # of the inputs: what was read before it is not lost
        while under_way:
            yield next_result()
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, most likely for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if problem is not None:
        raise problem


def _chunks(kind: SourceKind, records: Iterator[PlacedRecord]) -> Iterator[_Chunk]:
    chunk: list[RawRecord] = []
    in_memory = part = end = 0
    problem: DataError | None = None
    while True:
        try:
            placed = next(records, None)
        except DataError as error:
            placed, problem = None, error
        is_full = len(chunk) >= MAX_RECORDS[kind] or in_memory >= MAX_BYTES
        has_lines = bool(chunk) and isinstance(chunk[-1].content, Lines)
        if chunk and (is_full or has_lines or placed is None or placed.part != part):
            yield _Chunk(chunk, part, end)
            chunk, in_memory = [], 0
        if placed is None:
            break
        chunk.append(placed.record)
        in_memory += placed.record.num_bytes
        part, end = placed.part, placed.end
    if problem is not None:
        raise problem


def _start_worker() -> None:
    gc.set_threshold(GC_THRESHOLD)
    _end_with_parent()


def _end_with_parent() -> None:
    """End this worker when the process that it works for is killed: the pool's queues would keep it waiting forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by multiprocessing"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode(settings: EncoderSettings, fields: tuple[tuple[Any, ...], ...]) -> EncodedChunk:
    """Return records encoded that come field by field, which takes a quarter of the time to pickle."""
    return _encoder(settings).encode_chunk([RawRecord(*values) for values in zip(*fields, strict=True)])


@cache
def _encoder(settings: EncoderSettings) -> Encoder:
    return Encoder(settings)
