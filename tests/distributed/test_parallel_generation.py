"""A training checkpoint generates under tensor parallelism what its export generates with transformers."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.config import RunConfig
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from megatron_kosmos.engine.generate import Decoding, GenerationError, Generator, Sampling
from megatron_kosmos.engine.parallel_generation import ending_together, load_trained
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.hf import KosmosForConditionalGeneration, KosmosProcessor
from megatron_kosmos.hf.load_export import load_export
from megatron_kosmos.parallel.topology import build_topology, stop_process_group
from tests.distributed.harness import run_ranks
from tests.distributed.presets import shrunk
from tests.distributed.tiny import rank_batches, tiny_run
from tests.unit.engine.exported import TEXT, picture
from tests.unit.hf.checkpoints import trained_run

pytestmark = pytest.mark.distributed

PROMPTS = ["An image of", "Words and <image> numbers <image>, so", "no picture", "seven"]
IMAGES = [[picture(0)], [picture(1), picture(2)], [], [picture(3)]]
MODELS: dict[str, dict[str, Any]] = {
    **{name: shrunk(name) for name in ("kosmos1", "kosmos_x", "kosmos2", "modern")},
    "grouped": {"model__decoder__num_query_groups": 2, "model__decoder__query_key_norm": True},
}
DAILY = {("kosmos1", 1), ("kosmos_x", 2), ("kosmos2", 2), ("modern", 2), ("grouped", 4)}
CASES = [
    pytest.param(model, tp_size, marks=() if (model, tp_size) in DAILY else pytest.mark.nightly)
    for model in MODELS
    for tp_size in (1, 2, 4)
]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 5},
    "without a cache": {"num_beams": 1, "use_cache": False},
}


def spread(weights: dict[str, Tensor]) -> None:
    """Scale the weights so that each prompt gets tokens of its own; a tied model would repeat its last token."""
    for name, tensor in weights.items():
        if name.endswith("word_embeddings.weight"):
            tensor.mul_(2 if "output_layer.weight" in weights else 0.1)
        elif tensor.dim() > 1:
            tensor.mul_(1.5)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what makes a model's run with a checkpoint, exported in its folder `hf`."""
    root = tmp_path_factory.mktemp("runs")
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(root / "tokenizer")

    @cache
    def make(model: str) -> Path:
        changes = MODELS[model] | {"model__decoder__vocab_size": 300, "model__decoder__max_sequence_length": 90}
        trained_run(root / model, root / "tokenizer", spread, **changes)
        to_hf(root / model, root / model / "hf", ExportOptions(verify=False))
        return root / model

    return make


def search(model: KosmosForConditionalGeneration, processor: KosmosProcessor) -> dict[str, Tensor]:
    """Return the tokens of every search for prompts of unequal length with none to two images, and their logits."""
    model.eval()
    inputs = processor(text=PROMPTS, images=IMAGES, return_tensors="pt")
    found = {name: model.generate(**inputs, max_new_tokens=8, **how) for name, how in SEARCHES.items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    return found | {"logits": logits[inputs["attention_mask"].bool()]}


def search_trained(source: Path) -> dict[str, Tensor]:
    return search(*load_trained(source))


def search_exported(folder: Path) -> dict[str, Tensor]:
    return search(*load_export(folder))


@pytest.mark.parametrize(("model", "tp_size"), CASES)
def test_every_rank_finds_the_tokens_of_the_export(model: str, tp_size: int, run_of: Callable[[str], Path]) -> None:
    expected = search_exported(run_of(model) / "hf")
    assert len(expected["greedy"][:, -8:].unique()) > 3
    assert not torch.equal(expected["greedy"], expected["beams"])
    for found in run_ranks(search_trained, tp_size, run_of(model)):
        assert all(torch.equal(found[name], expected[name]) for name in SEARCHES)
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)


def train(run: RunConfig) -> None:
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    runner = StepRunner(run, stage, topology)
    for step in range(2):
        runner.train(step, rank_batches(step, "timm", topology))
    store = CheckpointStore(run.run_dir / "checkpoints", topology, keep_last=1)
    store.save(2, stage, {"config": run.model_dump(mode="json"), "data": None})


def describe_model(source: Path) -> tuple[dict[str, Tensor], int, torch.dtype]:
    model, processor = load_trained(source)
    cut = {id(one) for one in model.parameters() if getattr(one, "tensor_model_parallel", False)}
    whole = sum(one.numel() * (dist.get_world_size() if id(one) in cut else 1) for one in model.parameters())
    return search(model, processor), whole, model.dtype


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), pytest.param("bf16", 0.1, marks=pytest.mark.nightly)]
)
def test_a_checkpoint_of_another_layout_is_cut_anew(precision: str, tolerance: float, tmp_path: Path) -> None:
    """Trained under two stages of two tensor ranks; each rank then holds its part alone, in the run's precision."""
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(tmp_path / "tokenizer")
    settings: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "data__tokenizer": str(tmp_path / "tokenizer"),
        "model__decoder__vocab_size": 300,
        "model__decoder__max_sequence_length": 90,
        "parallel__tensor_parallel_size": 2,
        "parallel__pipeline_parallel_size": 2,
        "training__precision": precision,
    }
    run_ranks(train, 4, tiny_run(**settings))
    report = to_hf(tmp_path / "run", tmp_path / "hf", ExportOptions(verify=False))
    expected, dtype = search_exported(tmp_path / "hf"), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for found, num_parameters, its_dtype in run_ranks(describe_model, 2, tmp_path / "run"):
        assert (num_parameters, its_dtype) == (report.num_parameters + 2 * 4 * 32, dtype)  # 304 rows
        assert precision == "bf16" or all(torch.equal(found[name], expected[name]) for name in SEARCHES)
        torch.testing.assert_close(found["logits"].float(), expected["logits"], rtol=0, atol=tolerance)
    assert expected["logits"].std() > 0.5


def message_of(work: Callable[[], object]) -> str:
    """Return what ends this rank's work, which each rank must hear."""
    try:
        work()
    except GenerationError as error:
        return str(error)
    return "no error"


def mistakes(run: Path, damaged: Path, empty: Path) -> dict[str, str]:
    rank, device = dist.get_rank(), torch.device("cpu")
    model, processor = load_trained(run)
    inputs = processor(text=["seven", "eight"][rank], return_tensors="pt")

    def end_alone() -> None:
        with ending_together(device):
            if rank == 1:
                raise OSError("no such picture")
            model.generate(**inputs, max_new_tokens=2)

    return {
        "empty": message_of(lambda: load_trained(empty)),
        "damaged": message_of(lambda: load_trained(damaged)),
        "no tokenizer": message_of(lambda: load_trained(run, [None, empty][rank])),
        "different": message_of(lambda: model.generate(**inputs, max_new_tokens=2)),
        "alone": message_of(end_alone),
        "too long": message_of(lambda: Generator(model, processor).generate(["seven"], decoding=Decoding(99))),
    }


def test_ranks_end_together_and_say_why(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("kosmos1")
    damaged = tmp_path / "step_00000001"
    shutil.copytree(next((run / "checkpoints").glob("step_*")), damaged)
    file = next(damaged.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    heard, also_heard = run_ranks(mistakes, 2, run, damaged, tmp_path / "empty")
    assert heard == also_heard
    assert f"no whole checkpoint at {tmp_path / 'empty'}; give a run's folder or one of its" in heard["empty"]
    assert "has its size but not its sha256 checksum" in heard["damaged"]
    assert heard["no tokenizer"].startswith(f"rank 1: no tokenizer at {tmp_path / 'empty'}")
    assert "the processes were given different prompts, pictures or settings" in heard["different"]
    assert heard["alone"] == "rank 1: no such picture"
    assert "more than the 90 of the model" in heard["too long"]


def test_a_model_that_cannot_be_cut_so_is_refused(run_of: Callable[[str], Path]) -> None:
    run = run_of("grouped")
    for message in run_ranks(lambda: message_of(lambda: load_trained(run)), 3):
        assert "3 processes can't share this model, start 1, 2, 4 of them" in message
        assert "model.decoder.num_heads=4 is not a multiple of parallel.tensor_parallel_size=3" in message


def test_one_process_generates_from_a_run_as_from_its_export(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("kosmos1")
    decoding = Decoding(6, sampling=Sampling(seed=3))
    expected = Generator.load(run / "hf").generate(PROMPTS, IMAGES, decoding)
    try:
        for source in (run, run / "checkpoints"):
            assert Generator.load(source, max_batch_size=3).generate(PROMPTS, IMAGES, decoding) == expected
        with pytest.raises(GenerationError, match="leave out device"):
            Generator.load(run, torch.device("cpu"))
        (tmp_path / "config.yaml").touch()
        with pytest.raises(GenerationError, match="no whole checkpoint at"):
            Generator.load(tmp_path)
    finally:
        stop_process_group()
