"""Streamed safetensors: what transformers reads back, in one file or several."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_kosmos.hf import KosmosForConditionalGeneration
from megatron_kosmos.hf.shards import INDEX_FILE, ShardWriter
from tests.unit.hf.tiny import tiny_model


@pytest.mark.parametrize("max_bytes, num_files", [(1 << 30, 1), (20_000, 7), (1, 110)])
def test_any_number_of_files_loads_to_the_same_model(max_bytes: int, num_files: int, tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    writer = ShardWriter(tmp_path, max_bytes)
    for name, parameter in model.named_parameters():
        writer.add(name, parameter)
    writer.close()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    assert not list(tmp_path.glob("*.writing"))
    assert writer.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    loaded = KosmosForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert (tmp_path / INDEX_FILE).exists() == (num_files > 1)
    if num_files > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        for file in files:
            names = load_file(tmp_path / file).keys()
            assert {name for name, place in index["weight_map"].items() if place == file} == set(names)


def test_parts_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    writer = ShardWriter(tmp_path, 1 << 20)
    writer.add("head", whole[:3])
    writer.add("tail", whole[3:])
    writer.add("turned", whole.T)
    writer.close()
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["head"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert stored["tail"].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert stored["turned"].tolist() == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_files_are_readable_to_those_whom_the_umask_lets(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 1)
    for name in ("one", "other"):
        writer.add(name, torch.ones(1))
    writer.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert {path.stat().st_mode for path in files} == {(tmp_path / INDEX_FILE).stat().st_mode}
