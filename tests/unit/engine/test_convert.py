"""Exports: what is refused, what is left behind, and what the folder holds."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_kosmos.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.cli import convert as convert_command
from megatron_kosmos.config import ConfigError
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.making import import_tokenizer
from megatron_kosmos.engine import conversion, convert
from megatron_kosmos.engine.conversion import ConversionError
from megatron_kosmos.engine.convert import ExportOptions, last_metrics, to_hf
from megatron_kosmos.engine.inspect_checkpoint import open_checkpoint
from megatron_kosmos.engine.verify_conversion import verification_batch
from megatron_kosmos.hf.name_map import Entry, NameMapError
from tests.distributed.presets import shrunk
from tests.distributed.tiny import tiny_run
from tests.unit.data.tokenization.foreign_tokenizers import falcon_like
from tests.unit.engine.exported import TEXT
from tests.unit.hf.checkpoints import STEP, trained_run


@pytest.fixture(scope="module")
def run_dir(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trained_run(folder, tokenizer)
    return folder


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_complete(run_dir: Path, tmp_path: Path) -> None:
    report = to_hf(run_dir, tmp_path / "out", ExportOptions(max_shard_bytes=100_000))
    names = left_behind(tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]
    assert {"README.md", "config.json", "conversion.json", "generation_config.json", "tokenizer.model"} <= set(names)
    assert "model.safetensors.index.json" in names
    assert all(
        (tmp_path / "out" / f"{part}_kosmos.py").is_file() for part in ("modeling", "processing", "configuration")
    )
    weights: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        weights |= load_file(file)
    assert weights["text_model.model.embed_tokens.weight"].shape == (347, 32)  # 352 in training
    assert report.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert (report.step, report.dtype) == (STEP, "float32")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("7 of 10", f"{report.num_parameters:,}", "| loss | 3.1250 |", "| heldout loss text | 3.2500 |"):
        assert fact in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    del generation["transformers_version"]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": [0, 1, 4, 5]}
    assert generation == ids | {"max_new_tokens": 64}  # and so one beam, and nothing is drawn


def test_a_byte_level_tokenizer_needs_no_code_in_the_folder(tmp_path: Path) -> None:
    import_tokenizer(falcon_like(tmp_path / "falcon", TEXT, vocab_size=300)).save(tmp_path / "tokenizer")
    trained_run(tmp_path / "run", tmp_path / "tokenizer", **shrunk("kosmos2"))
    to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(verify=False))
    names = left_behind(tmp_path / "out")
    assert "tokenizer.json" in names
    assert not {"tokenizer.model", "kosmos_tokenizer.json", "tokenization_kosmos.py"} & set(names)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["suppress_tokens"]) == (11, [300, 301, 303, 304])
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("| positions | sinusoidal |", "embeddings scaled", "normalized features", "| one cross-attention, 3 "):
        assert fact in card


def test_an_output_that_exists_is_kept_unless_overwriting(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ConversionError, match="exists; choose another folder"):
        to_hf(run_dir, tmp_path / "out")
    assert left_behind(tmp_path / "out") == ["precious"]
    to_hf(run_dir, tmp_path / "out", ExportOptions(overwrite=True, verify=False))
    assert left_behind(tmp_path) == ["out"]
    assert "precious" not in left_behind(tmp_path / "out")


def test_a_wrong_map_is_caught_and_nothing_is_put_in_place(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = convert.table_of

    def keys_for_values(*args: object) -> tuple[Entry, ...]:
        return tuple(
            replace(entry, hf_names=(entry.hf_names[0], entry.hf_names[2], entry.hf_names[1]))
            if entry.training_name == "decoder.layers.2.self_attention.linear_qkv.weight"
            else entry
            for entry in right(*args)  # type: ignore[arg-type]
        )

    monkeypatch.setattr(convert, "table_of", keys_for_values)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=r"differ from the source's by .* nothing was put in place"):
        to_hf(run_dir, tmp_path / "out", ExportOptions(overwrite=True))
    assert left_behind(tmp_path) == ["out"]
    assert left_behind(tmp_path / "out") == []


def test_weights_that_are_not_numbers_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    def poison(weights: dict[str, Tensor]) -> None:
        weights["decoder.layers.1.mlp.linear_fc1.bias"][3] = torch.nan

    trained_run(tmp_path / "run", tokenizer, poison)
    with pytest.raises(ConversionError, match="by nan"):
        to_hf(tmp_path / "run", tmp_path / "out")
    assert left_behind(tmp_path) == ["run"]


def _rename(weights: dict[str, Tensor]) -> None:
    weights["decoder.final_norm.weight"] = weights.pop("decoder.final_layernorm.weight")


def _reshape(weights: dict[str, Tensor]) -> None:
    weights["resampler.latents"] = weights["resampler.latents"][:2].clone()
    weights["output_layer.weight"] = weights["output_layer.weight"][:347].clone()


@pytest.mark.parametrize(
    "change, problems",
    [
        (_rename, ["missing: decoder.final_layernorm.weight [32]", "left over: decoder.final_norm.weight [32]"]),
        (_reshape, ["resampler.latents is [2, 16], the model wants [3, 16]", "output_layer.weight is [347, 32]"]),
    ],
)
def test_tensors_that_do_not_fit_are_all_listed(
    change: Callable[[dict[str, Tensor]], None], problems: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    trained_run(tmp_path / "run", tokenizer, change)
    with pytest.raises(NameMapError) as caught:
        to_hf(tmp_path / "run", tmp_path / "out")
    assert all(problem in str(caught.value) for problem in problems)
    assert left_behind(tmp_path) == ["run"]


def test_a_damaged_checkpoint_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    trained_run(tmp_path / "run", tokenizer)
    folder = tmp_path / "run" / "checkpoints" / f"step_{STEP:08d}"
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        to_hf(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no whole checkpoint at"):
        to_hf(tmp_path / "run", tmp_path / "out")
    assert left_behind(tmp_path) == ["run"]


def test_a_run_means_its_newest_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    newest = run_dir / "checkpoints" / f"step_{STEP:08d}"
    sources = run_dir, run_dir / "checkpoints", newest
    assert [open_checkpoint(source, contents=True).folder for source in sources] == [newest] * 3
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        open_checkpoint(tmp_path, contents=True)


def test_a_tokenizer_of_another_run_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    trained_run(tmp_path / "run", tmp_path / "gone", model__decoder__vocab_size=290)
    with pytest.raises(ConversionError, match=r"has 300 ids, the model vocab_size=290: it is not the one of this run"):
        to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(tokenizer=tokenizer))
    with pytest.raises(DataError, match=r"no tokenizer at .*gone"):
        to_hf(tmp_path / "run", tmp_path / "out")


def test_without_verification_the_report_says_so(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=conversion.__name__):
        report = to_hf(run_dir, tmp_path / "out", ExportOptions(verify=False))
    assert report.max_abs_logit_diff is None
    assert "not compared" in caplog.text
    assert "was not compared" in (tmp_path / "out" / "README.md").read_text()


def test_verification_leaves_no_process_group_and_refuses_to_join_one(run_dir: Path, tmp_path: Path) -> None:
    to_hf(run_dir, tmp_path / "out")
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="one runs already"):
            to_hf(run_dir, tmp_path / "other")
    finally:
        dist.destroy_process_group()


def test_a_configuration_of_another_version_is_refused_by_field(tmp_path: Path) -> None:
    state = {"config": tiny_run().model_dump(mode="json") | {"experts": 8}}
    folder = save_checkpoint(tmp_path, STEP, [], state, CheckpointMesh(), keep_last=2)
    with pytest.raises(ConfigError, match=r"state\.json: 1 problem[^$]*experts"):
        to_hf(folder, tmp_path / "out")


@pytest.mark.parametrize("longest, images", [(300, 2), (12, 2), (7, 1)])
def test_verification_shows_as_many_images_as_fit(longest: int, images: int) -> None:
    changes = {"model__decoder__max_sequence_length": longest, "data__sequence_length": 7}
    batch = verification_batch(tiny_run(**changes).model)
    assert len(batch.images) == images
    assert batch.input_ids.shape[1] <= longest
    assert (batch.image_positions[:, 1] + 3 <= batch.input_ids.shape[1]).all()


def test_last_metrics_end_at_the_step(run_dir: Path, tmp_path: Path) -> None:
    assert last_metrics(run_dir / "metrics.jsonl", 7) == {"step": 7, "loss": 3.125, "heldout_loss_text": 3.25}
    assert last_metrics(tmp_path / "none.jsonl", 7) == {}
    lines = (
        b'{"step": 7, "loss": 3.0}',
        b"[]",
        b'{"loss": 1}',
        b"\xff",
        b'{"step": 7, "grad_norm": 2.0}',
        b'{"step": 7, "l',
    )
    (tmp_path / "cut.jsonl").write_bytes(b"\n".join(lines))
    assert last_metrics(tmp_path / "cut.jsonl", 7) == {"step": 7, "loss": 3.0, "grad_norm": 2.0}


def test_the_command_reports_and_fails_in_words(run_dir: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    convert_command.register(app)
    runner = CliRunner()
    result = runner.invoke(app, ["convert", "to-hf", str(run_dir), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "largest difference of logits" in result.output
    result = runner.invoke(app, ["convert", "to-hf", str(run_dir), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
