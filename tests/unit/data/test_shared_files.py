"""Arrays that one process leaves for others are read back, or are taken for absent."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kosmos.data.shared_files import read_arrays, write_arrays


def test_arrays_come_back(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", [np.arange(3), np.arange(5)])
    content = read_arrays(tmp_path / "a")
    assert content is not None
    assert content.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert read_arrays(tmp_path / "b") is None


@pytest.mark.parametrize("place", [0, 20, -1], ids=["first", "middle", "checksum"])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a"
    write_arrays(path, [np.arange(8)])
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert read_arrays(path) is None


@pytest.mark.parametrize("num_bytes", [0, 1, 16, 32, 64, 95])
def test_a_cut_file_is_noticed(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "a"
    write_arrays(path, [np.arange(8)])
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert read_arrays(path) is None
