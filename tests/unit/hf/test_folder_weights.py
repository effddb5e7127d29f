"""What is refused of a Hugging Face folder before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_kosmos.hf.folder_weights import FolderError, FolderWeights
from megatron_kosmos.hf.formats import read_config
from tests.unit.hf.tiny import tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def open_folder(folder: Path) -> FolderWeights:
    """Do what every conversion from a folder begins with."""
    read_config(folder)
    return FolderWeights(folder)


def test_names_shapes_and_dtypes_are_those_of_the_files(source: Path) -> None:
    weights, stored = open_folder(source), load_file(source / WEIGHTS)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert set(weights.dtypes.values()) == {"F32"}
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in stored.items())


def test_links_are_followed_as_the_hub_s_cache_has_them(source: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in source.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert open_folder(tmp_path / "snapshot").shapes == open_folder(source).shapes


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _another_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _config_of_wrong_types(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))


def _config_that_nests_nothing(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_config": 3}))


def _two_sets_of_weights(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


def _twice_in_the_shards(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "model-1.safetensors")
    (folder / WEIGHTS).rename(folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _lost_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


def _index(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (shutil.rmtree, "is not a folder"),
        (_no_config, r"has no config\.json"),
        (_broken_config, "is not a configuration of transformers"),
        (_another_architecture, "model_type='llama'; megatron_kosmos and kosmos-2 can be converted"),
        (_config_of_wrong_types, "is not a configuration of transformers: TypeError"),
        (_config_that_nests_nothing, "is not a configuration of transformers"),
        (_two_sets_of_weights, r"has both model\.safetensors and .*index\.json"),
        (_twice_in_the_shards, r"is in model-1\.safetensors and in model-2\.safetensors"),
        (_pickled, r"has its weights in pytorch_model\.bin: pickled files .* Save them as safetensors"),
        (_nothing, r"has neither model\.safetensors nor"),
        (_truncated, "cannot be read"),
        (_lost_shard, r"lacks model-1\.safetensors"),
        (_index("[]"), "is not an index of safetensors files"),
        (_index('{"weight_map": {"a": 3}}'), "is not an index of safetensors files"),
    ],
)
def test_what_is_no_model_is_refused(damage: Callable[[Path], None], problem: str, source: Path) -> None:
    damage(source)
    with pytest.raises(FolderError, match=problem):
        open_folder(source)
