"""The pool keeps the order of documents, reads ahead only a little, and tells when a worker was killed."""

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.encoding import EncoderSettings
from megatron_kosmos.data.preparation.part_plan import PartPlan, PlacedRecord
from megatron_kosmos.data.preparation.pool import CHUNKS_UNDER_WAY, PlacedChunk, encode_records
from megatron_kosmos.data.sources.input_format import USUAL
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

PART_BYTES = 4 << 10
"""And of a chunk."""
NUM_DOCUMENTS = 5000
ROOT = Path(__file__).parents[4]
WriteLines = Callable[[str, Sequence[str]], Path]


@pytest.fixture
def settings(tokenizer_folder: Path) -> EncoderSettings:
    return EncoderSettings("text", tokenizer_folder, Filters(), RowFormat())


@pytest.fixture
def numbered(write_lines: WriteLines) -> Path:
    return write_lines("numbered.jsonl", [json.dumps({"text": str(number)}) for number in range(NUM_DOCUMENTS)])


def encode(settings: EncoderSettings, files: list[Path], num_workers: int) -> Generator[PlacedChunk]:
    """Encode files in many chunks."""
    plan = PartPlan(files, [file.stat().st_size for file in files], PART_BYTES)
    return encode_records(settings, plan.read("text", USUAL, range(plan.num_parts)), num_workers)


def test_chunks_come_in_order(settings: EncoderSettings, numbered: Path, tokenizer: KosmosTokenizer) -> None:
    chunks = list(encode(settings, [numbered, numbered], num_workers=3))
    encoded = [chunk.encoded for chunk in chunks]
    documents = [ids for chunk in encoded for ids in np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1])]
    texts = [tokenizer.decode(document) for document in documents]
    assert texts == [str(number) for number in range(NUM_DOCUMENTS)] * 2
    ends = [chunk.end for chunk in chunks]
    assert ends == sorted(ends)
    assert ends[-1] == 2 * numbered.stat().st_size


def test_a_killed_worker_is_told(settings: EncoderSettings, numbered: Path) -> None:
    before = set(multiprocessing.active_children())
    chunks = encode(settings, [numbered], num_workers=2)
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
    chunks = encode(settings, [numbered], num_workers=2)
    next(chunks)
    chunks.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_the_input_comes_after_what_was_read_before(
    settings: EncoderSettings, numbered: Path, write_lines: WriteLines, num_workers: int
) -> None:
    few = write_lines("few.jsonl", ['{"text": "x"}'] * 3)
    files = [numbered, few, few]
    plan = PartPlan(files, [numbered.stat().st_size, few.stat().st_size, 1], PART_BYTES)
    chunks = encode_records(settings, plan.read("text", USUAL, range(plan.num_parts)), num_workers)
    before: list[PlacedChunk] = []
    with pytest.raises(DataError, match=r"few\.jsonl had 1 bytes and has 42: it is changing"):
        before.extend(chunks)
    assert sum(chunk.encoded.num_documents for chunk in before) == NUM_DOCUMENTS + 3


def test_reading_ahead_is_bounded(settings: EncoderSettings, numbered: Path, tmp_path: Path) -> None:
    read = 0

    def records() -> Iterator[PlacedRecord]:
        nonlocal read
        plan = PartPlan([numbered], [numbered.stat().st_size], PART_BYTES)
        for record in plan.read("text", USUAL, range(plan.num_parts)):
            read += 1
            yield record

    next(encode_records(settings, records(), num_workers=2))
    assert read <= 2 * (2 * CHUNKS_UNDER_WAY + 1)  # a chunk is a block of lines and the line between two blocks


WORK = """
import multiprocessing, signal, sys
from pathlib import Path
from megatron_kosmos.data.preparation.encoding import EncoderSettings
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from tests.unit.data.preparation.test_pool import encode
chunks = encode(EncoderSettings("text", Path(sys.argv[1]), Filters(), RowFormat()), [Path(sys.argv[2])], 2)
next(chunks)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
signal.pause()
"""


def test_workers_end_with_a_killed_parent(tokenizer_folder: Path, numbered: Path) -> None:
    command = [sys.executable, "-c", WORK, str(tokenizer_folder), str(numbered)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        workers = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    for worker in workers:
        assert select.select([worker], [], [], 60)[0], "a worker outlives its parent"
        os.close(worker)
