"""Parts follow from the sizes of files: every record is in one part, and only files that a part needs are read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.preparation.part_plan import PartPlan, default_part_bytes
from megatron_kosmos.data.sources.input_format import USUAL

WriteLines = Callable[[str, Sequence[str]], Path]


def plan(files: Sequence[Path], part_bytes: int) -> PartPlan:
    return PartPlan(files, [file.stat().st_size for file in files], part_bytes)


def test_a_record_belongs_to_the_part_of_its_last_byte(write_lines: WriteLines) -> None:
    files = [
        write_lines("a.jsonl", ['{"text": "1"}', '{"text": "2"}']),  # 14 bytes each
        write_lines("empty.jsonl", []),
        write_lines("b.jsonl", ['{"text": "3"}', json.dumps({"text": "4" * 30})]),  # 14 and 43
    ]
    found = plan(files, 14)
    assert (found.num_parts, found.total_bytes) == (7, 85)
    records = list(found.read("text", USUAL, range(7)))
    assert [(placed.part, placed.end) for placed in records] == [(0, 14), (1, 28), (2, 42), (6, 85)]
    assert [list(found.parts_of_file(number)) for number in range(3)] == [[0, 1], [2], [2, 3, 4, 5, 6]]
    assert [found.bytes_of(part) for part in range(7)] == [14] * 6 + [1]
    assert [list(found.shard(index, 3)) for index in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [list(found.shard(index, 9)) for index in range(9)].count([]) == 2


def test_files_of_other_parts_stay_closed(write_lines: WriteLines, tmp_path: Path) -> None:
    a, b = write_lines("a.jsonl", ['{"text": "1"}']), write_lines("b.jsonl", ['{"text": "2"}'])
    found = plan([a, b], 14)
    a.unlink()
    assert [placed.record.place for placed in found.read("text", USUAL, [1])] == ["1"]
    with pytest.raises(DataError, match=r"no input file at .*a\.jsonl"):
        list(found.read("text", USUAL, [0]))


def test_a_file_that_changed_is_told(write_lines: WriteLines) -> None:
    file = write_lines("a.jsonl", ['{"text": "1"}'])
    found = plan([file], 14)
    file.write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl had 14 bytes and has 0: it is changing"):
        list(found.read("text", USUAL, [0]))


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 50), st.integers(1, 9))
def test_parts_shards_and_bytes_add_up(sizes: list[int], part_bytes: int, num_shards: int) -> None:
    found = PartPlan([Path(str(number)) for number in range(len(sizes))], sizes, part_bytes)
    parts = [part for index in range(num_shards) for part in found.shard(index, num_shards)]
    assert parts == list(range(found.num_parts))
    assert sum(map(found.bytes_of, parts)) == sum(sizes)
    for number in range(len(sizes)):
        touched = found.parts_of_file(number)
        assert 0 <= touched.start < touched.stop <= found.num_parts


def test_sizes_follow_from_what_the_inputs_hold() -> None:
    assert default_part_bytes("text", [Path("a.parquet")]) == 64 << 20
    assert default_part_bytes("caption", [Path("a.tar"), Path("b.parquet")]) == 256 << 20
    assert default_part_bytes("caption", [Path("a.tar"), Path("b.jsonl.gz")]) == 4 << 20
    assert default_part_bytes("interleaved", [Path("a.html")]) == 4 << 20
