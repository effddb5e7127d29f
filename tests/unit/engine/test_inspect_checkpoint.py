"""What is told of checkpoints, and of two of them: figures against numpy, damage, differences, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from megatron_kosmos import __version__
from megatron_kosmos.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_kosmos.checkpoint.load import read_tensors
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard
from megatron_kosmos.cli.main import build_app
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.compare_checkpoints import Comparison, compare
from megatron_kosmos.engine.inspect_checkpoint import (
    CheckpointFigures,
    matching,
    measure,
    open_checkpoint,
    read_facts,
)
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

Tensors = dict[str, Tensor]
EMBEDDING, FC = "model/embedding.word_embeddings.weight", "model/decoder.layers.0.mlp.linear_fc1.weight"


def silent(doing: str, done: int, total: int) -> None:
    assert 0 <= done <= total, doing


def save_two_steps(run: RunConfig, root: Path) -> None:
    """Train two steps and save behind each."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    store = CheckpointStore(root, topology, keep_last=2)
    stage, _ = build_stage(run, topology, store)
    runner = StepRunner(run, stage, topology)
    for step in range(2):
        runner.train(step, rank_batches(step, "timm", topology))
        store.save(step + 1, stage, {"config": run.model_dump(mode="json"), "data": "fingerprint"})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = tiny_run(run_dir=str(folder), parallel__tensor_parallel_size=2)
    run_ranks(save_two_steps, 2, run, folder / "checkpoints")
    return folder


def saved(root: Path, tensors: Tensors, step: int = 5, **state: Any) -> Path:
    shards = [TensorShard(name, tensor, None) for name, tensor in tensors.items()]
    return save_checkpoint(root, step, shards, state, CheckpointMesh(), 9)


def measured(source: Path) -> CheckpointFigures:
    stored = open_checkpoint(source, True, silent)
    return measure(stored, read_facts(stored, True), silent)


def compared(one: Path, other: Path) -> Comparison:
    stored, another = (open_checkpoint(folder, True, silent) for folder in (one, other))
    return compare(stored, measured(one), another, read_facts(another, True), silent)


def small_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        EMBEDDING: torch.randn(6, 4, generator=generator),
        FC: torch.randn(3, 4, generator=generator).bfloat16(),
        "optimizer/decoder.layers.0.mlp.linear_fc1.weight/exp_avg": torch.randn(3, 4, generator=generator),
        "optimizer/decoder.layers.0.mlp.linear_fc1.weight/exp_avg_sq": torch.rand(3, 4, generator=generator),
    }


def flip_the_last_bit(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_every_tensor_has_the_figures_of_numpy(run_dir: Path) -> None:
    figures = measured(run_dir)
    values = {name: tensor.double().numpy() for name, tensor in read_tensors(run_dir / "checkpoints/step_00000002")}
    assert [one.name for one in figures.tensors] == list(values)
    for one in figures.tensors:
        expected = values[one.name]
        numbers = (one.norm, one.min, one.max, one.mean, one.std, one.max_abs)
        by_numpy = (
            np.linalg.norm(expected),
            *(expected.min(), expected.max(), expected.mean(), expected.std()),
            np.abs(expected).max(),
        )
        np.testing.assert_allclose(np.array(numbers, dtype=float), by_numpy, rtol=1e-9, atol=1e-15, err_msg=one.name)
        assert (one.shape, one.dtype, one.num_bytes) == (expected.shape, "float32", 4 * expected.size)
    assert figures.not_finite == []


def test_every_part_has_the_figures_of_numpy(run_dir: Path) -> None:
    figures = measured(run_dir)
    values = {name: tensor.double().numpy() for name, tensor in read_tensors(run_dir / "checkpoints/step_00000002")}
    prefixes = {
        "embedding": "embedding.",
        "vision": "vision_tower.",
        "resampler": "resampler.",
        "decoder": "decoder.",
        "output": "output_layer.",
    }
    assert [part.part for part in figures.parts] == list(prefixes)
    for part in figures.parts:
        prefix = prefixes[part.part]
        weights = {name[6:]: value for name, value in values.items() if name.startswith(f"model/{prefix}")}
        first, second = (
            {name: values[f"optimizer/{name}/{key}"] for name in weights if f"optimizer/{name}/{key}" in values}
            for key in ("exp_avg", "exp_avg_sq")
        )
        updates = np.concatenate(
            [(first[name] ** 2)[second[name] > 0] / second[name][second[name] > 0] for name in first]
        )
        trained, whole = (sum(value.size for value in values.values()) for values in (first, weights))
        assert (part.num_elements, part.trained, part.frozen) == (whole, trained, whole - trained)
        assert (whole > trained) == (part.part == "vision")
        assert (part.weight_bytes, part.moment_bytes) == (4 * whole, 8 * trained)
        got = (part.weight_norm, part.largest_weight, part.exp_avg_norm, part.exp_avg_sq_norm, part.update_rms)
        expected = (
            np.linalg.norm(np.concatenate([value.ravel() for value in weights.values()])),
            max(np.abs(value).max() for value in weights.values()),
            *(np.linalg.norm(np.concatenate([v.ravel() for v in moments.values()])) for moments in (first, second)),
            np.sqrt(updates.mean()),
        )
        np.testing.assert_allclose(np.array(got, dtype=float), expected, rtol=1e-9)


def test_the_facts_are_those_of_the_run_that_saved(run_dir: Path) -> None:
    facts = measured(run_dir).facts
    assert (facts.step, facts.updates, facts.version, facts.data) == (2, 2, __version__, "fingerprint")
    assert facts.config["parallel"]["tensor_parallel_size"] == 2
    folder = run_dir / "checkpoints" / "step_00000002"
    assert facts.num_bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def test_nan_and_infinity_are_found_and_left_out_of_the_figures(tmp_path: Path) -> None:
    tensors = small_tensors()
    tensors[EMBEDDING][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    tensors[FC].fill_(torch.nan)
    figures = measured(saved(tmp_path, tensors))
    found = {one.name: one for one in figures.not_finite}
    assert {name: (one.num_nan, one.num_inf) for name, one in found.items()} == {EMBEDDING: (1, 2), FC: (12, 0)}
    finite = tensors[EMBEDDING].double().numpy().ravel()[3:]
    assert found[EMBEDDING].norm == pytest.approx(np.linalg.norm(finite), rel=1e-12)
    assert found[EMBEDDING].std == pytest.approx(finite.std(), rel=1e-12)
    assert (found[FC].norm, found[FC].min, found[FC].mean, found[FC].std) == (0.0, None, None, None)


def test_damage_is_told_and_a_run_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = (saved(tmp_path / "checkpoints", small_tensors(), step) for step in (1, 2))
    flip_the_last_bit(newer)
    with pytest.raises(DamagedCheckpointError, match="not its sha256 checksum"):
        open_checkpoint(newer, True, silent)
    assert open_checkpoint(tmp_path, True, silent).folder == older
    assert f"passing over the checkpoint {newer} is damaged" in caplog.text
    assert open_checkpoint(newer, False, silent).folder == newer
    (newer / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="the save did not finish"):
        open_checkpoint(newer, False, silent)
    with pytest.raises(CheckpointError, match="no whole checkpoint at"):
        open_checkpoint(tmp_path / "elsewhere", True, silent)


def test_a_broken_header_is_told_without_checksums(tmp_path: Path) -> None:
    folder = saved(tmp_path, small_tensors())
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"[" + content[9:])  # for the brace that opens the header
    with pytest.raises(DamagedCheckpointError, match="has a header that says nothing"):
        open_checkpoint(folder, False, silent)


def test_patterns_choose_tensors_by_either_name(run_dir: Path) -> None:
    stored = open_checkpoint(run_dir, False, silent)
    assert matching(stored, "decoder.layers.0.mlp.linear_fc1.w*") == [FC]
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert sorted(matching(stored, f"*{name}*")) == [FC, f"optimizer/{name}/exp_avg", f"optimizer/{name}/exp_avg_sq"]
    with pytest.raises(CheckpointError, match=r"matches 'decoder.latents'; there are .*resampler.latents"):
        matching(stored, "decoder.latents")


def test_a_checkpoint_is_itself(run_dir: Path) -> None:
    same = compared(run_dir, run_dir)
    assert (same.settings, same.missing, same.left_over, same.misshaped) == ({}, [], [], {})
    assert same.moments_identical
    assert all(
        (one.is_identical, one.difference, one.relative) == (True, 0.0, 0.0) for one in same.parts + same.tensors
    )


def test_differences_are_exact(tmp_path: Path) -> None:
    one = small_tensors() | {"model/resampler.latents": torch.zeros(2), "model/resampler.norm.bias": torch.ones(2)}
    other = {name: tensor.clone() for name, tensor in one.items() if "norm" not in name}
    other[FC][1, 2] += 0.5
    other["optimizer/decoder.layers.0.mlp.linear_fc1.weight/exp_avg"] += 1
    other["model/resampler.latents"] = torch.zeros(3)
    other["model/output_layer.weight"] = torch.ones(1)
    configs = [tiny_run().model_dump(mode="json"), tiny_run(optimizer__learning_rate=0.5).model_dump(mode="json")]
    del configs[1]["training"]["seed"]
    folders = [
        saved(tmp_path / str(number), tensors, config=config)
        for number, (tensors, config) in enumerate(zip((one, other), configs, strict=True))
    ]
    found = compared(*folders)
    assert found.settings == {"optimizer.learning_rate": ("0.01", "0.5"), "training.seed": ("1", "absent")}
    assert (found.missing, found.left_over) == (["model/resampler.norm.bias"], ["model/output_layer.weight"])
    assert found.misshaped == {"model/resampler.latents": ((2,), (3,))}
    assert not found.moments_identical
    difference = (one[FC].double() - other[FC].double()).norm().item()
    first, second = found.tensors
    assert (first.name, first.is_identical) == (FC, False)
    assert first.difference == pytest.approx(difference, rel=1e-12)
    assert first.relative == pytest.approx(difference / one[FC].double().norm().item(), rel=1e-12)
    assert (second.name, second.is_identical) == (EMBEDDING, True)
    assert {part.name: part.is_identical for part in found.parts} == {"embedding": True, "decoder": False}


def test_what_came_from_zero_or_is_not_finite_changed_most(tmp_path: Path) -> None:
    one = {EMBEDDING: torch.zeros(2), FC: torch.ones(2), "model/resampler.latents": torch.ones(2)}
    other = {
        EMBEDDING: torch.ones(2),
        FC: torch.tensor([1, torch.nan]),
        "model/resampler.latents": torch.full((2,), 9.0),
    }
    found = compared(saved(tmp_path / "a", one), saved(tmp_path / "b", other))
    changes = {change.name: change for change in found.tensors}
    assert found.tensors[-1] == changes["model/resampler.latents"]
    assert changes[EMBEDDING].difference == pytest.approx(2**0.5)
    assert (changes[EMBEDDING].relative, changes[FC].difference, changes[FC].relative) == (None, None, None)


def test_equal_values_of_other_bits_are_not_identical(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(zero), {EMBEDDING: torch.tensor([zero, 1.0])}) for zero in (0.0, -0.0)]
    (change,) = compared(*folders).tensors
    assert (change.is_identical, change.difference) == (False, 0.0)
    nan = saved(tmp_path / "nan", {EMBEDDING: torch.tensor([torch.nan, 1.0])})
    assert compared(nan, nan).tensors[0].is_identical


def test_the_command_prints_tables_and_writes_json(run_dir: Path, tmp_path: Path) -> None:
    older, file = run_dir / "checkpoints" / "step_00000001", tmp_path / "figures.json"
    command = ["inspect", "checkpoint", str(run_dir), str(older), "--tensors", "*latents", "--json", str(file)]
    result = CliRunner().invoke(build_app(), command, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for text in (
        "2 tensor x 1 pipeline, ZeRO 1",
        "every SHA-256 is right",
        "every element is finite",
        "model/resampler.latents",
    ):
        assert text in result.output
    assert "weights that changed most, 10 of" in result.output
    document = json.loads(file.read_text())
    assert set(document) == {"facts", "parts", "tensors", "not_finite", "comparison"}
    assert (document["facts"]["step"], document["comparison"]["facts"]["step"]) == (2, 1)
    assert {part["name"] for part in document["comparison"]["parts"]} == {part["part"] for part in document["parts"]}
    assert {"name", "shape", "dtype", "norm", "min", "max", "mean", "std", "num_nan"} <= set(document["tensors"][0])


def test_the_command_fails_in_words(tmp_path: Path) -> None:
    folder = saved(tmp_path, small_tensors())
    flip_the_last_bit(folder)
    result = CliRunner().invoke(build_app(), ["inspect", "checkpoint", str(folder)])
    assert isinstance(result.exception, SystemExit)
    assert "not its sha256 checksum" in str(result.exception.code or result.output)
    assert "--no-verify" in str(result.exception.code or result.output)
    result = CliRunner().invoke(build_app(), ["inspect", "checkpoint", str(folder), "--no-verify"])
    assert result.exit_code == 0, result.output
    assert "contents not checked" in result.output
    assert "layout      not recorded" in result.output


def test_without_any_moments_nothing_is_called_frozen(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in small_tensors().items() if name.startswith("model/")}
    folder, file = saved(tmp_path, weights, step=0), tmp_path / "figures.json"
    result = CliRunner().invoke(build_app(), ["inspect", "checkpoint", str(folder), "--json", str(file)])
    assert "frozen" not in result.output
    assert "no moments: AdamW starts from zero for whatever is trained" in result.output
    parts = json.loads(file.read_text())["parts"]
    counts = {part["part"]: (part["num_elements"], part["trained"], part["frozen"]) for part in parts}
    assert counts == {"embedding": (24, None, None), "decoder": (12, None, None)}
