"""A model from transformers goes through the training stack in any layout and comes out to the bit; and it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_kosmos.config import RunConfig, save_config
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from megatron_kosmos.engine.from_hf import ImportOptions, from_hf
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LENGTH, VOCAB, rank_batches, tiny_run
from tests.unit.hf.checkpoints import trained_run

pytestmark = pytest.mark.distributed

TEXT = ["An image of a handwritten seven. Words and numbers, 0 1 2 3 4 5 6 7 8 9.\nAnother line."] * 5
KOSMOS2: dict[str, Any] = {
    "model__decoder__xpos": False,
    "model__decoder__positions": "sinusoidal",
    "model__decoder__scale_embeddings": True,
    "model__vision__features": "normalized",
    "model__resampler": {"kind": "cross_attention", "num_latents": 3, "num_heads": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"model__decoder__vocab_size": 301},  # 304 rows
    "tied": {"model__decoder__vocab_size": 301, "model__decoder__tie_embeddings": True},
    "tied kosmos2": {"model__decoder__vocab_size": 303, "model__decoder__tie_embeddings": True, **KOSMOS2},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"parallel__tensor_parallel_size": 2}),
    "tp4": (4, {"parallel__tensor_parallel_size": 4}),
    "pp2": (2, {"parallel__pipeline_parallel_size": 2}),
    "tp2 pp2": (4, {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2}),
}


DAILY = {("tied", layout) for layout in ("tp4", "pp2")} | {("untied", "tp2"), ("tied kosmos2", "tp2 pp2")}
CASES = [
    pytest.param(model, layout, marks=() if (model, layout) in DAILY else pytest.mark.nightly)
    for model in MODELS
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that has, for each model, the configuration's changes exported and imported."""
    root = tmp_path_factory.mktemp("sources")
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(root / "tokenizer")
    for name, changes in MODELS.items():
        sizes: dict[str, Any] = {"model__decoder__max_sequence_length": LENGTH}
        trained_run(root / name / "made", root / "tokenizer", **(sizes | changes))
        to_hf(root / name / "made", root / name / "hf", ExportOptions(verify=False))
        save_config(tiny_run(**changes), root / name / "run.yaml")
        options = ImportOptions(config=root / name / "run.yaml", verify=False)
        from_hf(root / name / "hf", root / name / "run", options)
    return root


def save_again(run: RunConfig, root: Path, target: Path) -> int:
    """Load the newest checkpoint in `root` as `kosmos train` does and save it to `target`."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, step = build_stage(run, topology, CheckpointStore(root, topology, keep_last=1), "any data")
    CheckpointStore(target, topology, keep_last=1).save(1, stage, {"config": run.model_dump(mode="json"), "data": None})
    return step


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_layout_gives_the_weights_back(model: str, layout: str, sources: Path, tmp_path: Path) -> None:
    world_size, changes = LAYOUTS[layout]
    run = tiny_run(**MODELS[model], **changes, data__tokenizer=str(sources / "tokenizer"))
    steps = run_ranks(save_again, world_size, run, sources / model / "run" / "checkpoints", tmp_path / "checkpoints")
    assert steps == [0] * world_size
    to_hf(tmp_path, tmp_path / "hf", ExportOptions(verify=False))
    expected = load_file(sources / model / "hf" / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def losses(run: RunConfig, root: Path | None, num_steps: int) -> list[float]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    store = None if root is None else CheckpointStore(root, topology, keep_last=1)
    stage, start = build_stage(run, topology, store, "any data")
    runner = StepRunner(run, stage, topology)
    assert start == 0
    batches = (rank_batches(step, "timm", topology) for step in range(num_steps))
    return [runner.train(step, batch).sums.mean for step, batch in enumerate(batches)]


def save_fresh(run: RunConfig, root: Path) -> None:
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    CheckpointStore(root, topology, keep_last=1).save(1, stage, {"config": run.model_dump(mode="json"), "data": None})


def test_training_starts_from_converted_weights_as_it_does_from_its_own(tmp_path: Path) -> None:
    """Fresh weights that went to transformers and back train as they would have, moments and data from the start."""
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(tmp_path / "tokenizer")
    run = tiny_run(data__tokenizer=str(tmp_path / "tokenizer"), model__decoder__vocab_size=VOCAB + 250)
    run_ranks(save_fresh, 1, run, tmp_path / "checkpoints")
    to_hf(tmp_path, tmp_path / "hf", ExportOptions(verify=False))
    save_config(run, tmp_path / "run.yaml")
    from_hf(tmp_path / "hf", tmp_path / "run", ImportOptions(config=tmp_path / "run.yaml", verify=False))
    other_order = run.model_copy(update={"training": run.training.model_copy(update={"seed": 5})})
    expected = run_ranks(losses, 2, run, None, 4)[0]
    found = run_ranks(losses, 2, other_order, tmp_path / "run" / "checkpoints", 4)[0]
    assert found == expected
