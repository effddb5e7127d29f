"""How a corpus is cut into parts: by bytes of its input files, so that every process knows the cuts beforehand.

The inputs lie one behind the other; a part is a stretch of `part_bytes` of them, and a record, or a block of lines,
belongs to the part in which the last byte that was read for it lies.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.sources.documents import BLOCK_BYTES, CONTAINERS, check_input, read_blocks
from megatron_kosmos.data.sources.input_format import InputFormat
from megatron_kosmos.data.sources.readers.records import RawRecord
from megatron_kosmos.data.sources.readers.streams import format_suffix
from megatron_kosmos.prompt import SourceKind

TEXT_PART_BYTES = 64 << 20
PICTURES_PART_BYTES = 256 << 20
"""For containers, which hold the pictures themselves."""
LIST_PART_BYTES = 4 << 20
"""For lists and pages, which name pictures: these have many times the bytes."""


@dataclass(frozen=True)
class PlacedRecord:
    """A record, or a block of lines, and where it lies."""

    record: RawRecord
    part: int
    end: int
    """Bytes of all inputs up to its end."""


def default_part_bytes(kind: SourceKind, files: Sequence[Path]) -> int:
    """Return the size of a part where none is asked for."""
    if kind == "text":
        return TEXT_PART_BYTES
    has_pictures = all(format_suffix(file) in CONTAINERS for file in files)
    return PICTURES_PART_BYTES if has_pictures else LIST_PART_BYTES


class PartPlan:
    """The parts of some files, from their sizes alone."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[int], part_bytes: int) -> None:
        self._files, self._sizes, self._part_bytes = files, sizes, part_bytes
        self._starts = [0, *accumulate(sizes)]
        self.total_bytes = self._starts[-1]
        self.num_parts = max(1, -(-self.total_bytes // part_bytes))

    def bytes_of(self, part: int) -> int:
        """Return how many bytes of input a part has."""
        return min(self._part_bytes, self.total_bytes - part * self._part_bytes)

    def start_of(self, part: int) -> int:
        """Return how many bytes of input are before a part."""
        return part * self._part_bytes

    def shard(self, index: int, num_shards: int) -> range:
        """Return the parts of one of `num_shards` processes: neighbours, as many as others have or one more."""
        return range(index * self.num_parts // num_shards, (index + 1) * self.num_parts // num_shards)

    def parts_of_file(self, file: int) -> range:
        """Return the parts that the records of a file may belong to."""
        return range(self._part_at(file, 0), self._part_at(file, self._sizes[file]) + 1)

    def read(self, kind: SourceKind, names: InputFormat, parts: Collection[int]) -> Iterator[PlacedRecord]:
        """Yield the records of `parts` in order. Files without any of them stay closed. Raises DataError."""
        for number, file in enumerate(self._files):
            wanted = [part for part in self.parts_of_file(number) if part in parts]
            if not wanted:
                continue
            check_input(kind, file)
            if file.stat().st_size != self._sizes[number]:
                raise DataError(f"{file} had {self._sizes[number]} bytes and has {file.stat().st_size}: it is changing")
            offset = 0
            # Blocks no longer than parts, or parts would be empty; as long as these whatever the cut of the work.
            for record in read_blocks(kind, file, min(BLOCK_BYTES[kind], self._part_bytes), names):
                offset = max(offset, record.offset)  # the note of a damaged place may lie behind the last record
                part = self._part_at(number, offset)
                if part > wanted[-1]:
                    break
                if part in parts:
                    yield PlacedRecord(record, part, min(self._starts[number] + offset, self.total_bytes))

    def _part_at(self, file: int, offset: int) -> int:
        """Return the part of the byte before `offset`; empty files and records have the byte that comes next."""
        position = self._starts[file] + max(min(offset, self._sizes[file]), 1) - 1
        return min(position // self._part_bytes, self.num_parts - 1)
