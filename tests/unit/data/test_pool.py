"""The pool keeps the order of documents, reads ahead only a little, and tells when a worker was killed."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_kosmos.data.encoding import EncoderSettings
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.pool import CHUNKS_UNDER_WAY, MAX_RECORDS, encode_files
from megatron_kosmos.data.row_format import RowFormat
from megatron_kosmos.data.tokenizer import KosmosTokenizer


@pytest.fixture
def settings(tokenizer_folder: Path) -> EncoderSettings:
    return EncoderSettings("text", tokenizer_folder, Filters(), RowFormat())


@pytest.fixture
def numbered(write_lines: Callable[[str, Sequence[str]], Path]) -> Path:
    return write_lines(
        "numbered.jsonl", [json.dumps({"text": str(number)}) for number in range(20 * MAX_RECORDS["text"])]
    )


def test_chunks_come_in_order(settings: EncoderSettings, numbered: Path, tokenizer: KosmosTokenizer) -> None:
    chunks = list(encode_files(settings, [numbered, numbered], num_workers=3))
    texts = [tokenizer.decode(document.tokens) for chunk, _ in chunks for document in chunk.documents]
    assert texts == [str(number) for number in range(20 * MAX_RECORDS["text"])] * 2
    assert sum(num_bytes for _, num_bytes in chunks) == 2 * numbered.stat().st_size


def test_a_killed_worker_is_told(settings: EncoderSettings, numbered: Path) -> None:
    before = set(multiprocessing.active_children())
    chunks = encode_files(settings, [numbered], num_workers=2)
    next(chunks)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a worker process was killed, most likely for lack of memory"):
        list(chunks)
    assert set(multiprocessing.active_children()) == before


def test_leaving_early_ends_the_workers(settings: EncoderSettings, numbered: Path) -> None:
    before = set(multiprocessing.active_children())
    chunks = encode_files(settings, [numbered], num_workers=2)
    next(chunks)
    chunks.close()
    assert set(multiprocessing.active_children()) == before


def test_reading_ahead_is_bounded(settings: EncoderSettings, numbered: Path, tmp_path: Path) -> None:
    """Chunks beyond those under way are not read: a bad file behind them is not noticed yet."""
    chunks = encode_files(settings, [numbered, tmp_path / "none.jsonl"], num_workers=2)
    for _ in range(20 - 2 * CHUNKS_UNDER_WAY):
        next(chunks)
    with pytest.raises(DataError, match="no input file"):
        list(chunks)
