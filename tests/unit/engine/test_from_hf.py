"""From transformers' folders to runs: the same weights to the bit, and what is refused."""

import json
import logging
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_kosmos.checkpoint.load import StoredTensors
from megatron_kosmos.cli import convert as convert_command
from megatron_kosmos.config import load_config, save_config
from megatron_kosmos.data.tokenization.making import import_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine import from_hf as from_hf_module
from megatron_kosmos.engine.conversion import ConversionError
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from megatron_kosmos.engine.from_hf import ImportOptions, from_hf
from megatron_kosmos.hf.folder_weights import FolderError
from megatron_kosmos.hf.name_map import NameMapError
from tests.distributed.presets import shrunk
from tests.distributed.tiny import tiny_run
from tests.unit.checkpoint.test_save import run_in_child
from tests.unit.data.tokenization.foreign_tokenizers import falcon_like
from tests.unit.engine.exported import TEXT
from tests.unit.hf.checkpoints import trained_run

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    trained_run(folder / "run", tokenizer)
    to_hf(folder / "run", folder / "exported", ExportOptions(verify=False))
    return folder / "exported"


@pytest.fixture
def source(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "source")
    return tmp_path / "source"


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights_of(one), weights_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


MODELS: dict[str, dict[str, Any]] = {
    "kosmos1": {},
    "kosmos2": shrunk("kosmos2"),
    "modern": shrunk("modern"),
    "tied, padded": {"model__decoder__tie_embeddings": True, "model__decoder__vocab_size": 301},
}


@pytest.mark.parametrize(
    "kind",
    [
        "kosmos1",
        "tied, padded",
        pytest.param("kosmos2", marks=pytest.mark.nightly),
        pytest.param("modern", marks=pytest.mark.nightly),
    ],
)
def test_there_and_back_no_bit_changes(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    trained_run(tmp_path / "run", tokenizer, **MODELS[kind])
    to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(verify=False))
    report = from_hf(tmp_path / "out", tmp_path / "back")
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff <= 1e-5
    to_hf(tmp_path / "back", tmp_path / "again")
    assert_same_weights(tmp_path / "out", tmp_path / "again")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again")]
    assert configs[0] == configs[1]


def test_the_run_brings_its_configuration_and_tokenizer(exported: Path, tokenizer: Path, tmp_path: Path) -> None:
    from_hf(exported, tmp_path / "run", ImportOptions(verify=False))
    run = load_config(tmp_path / "run" / "config.yaml")
    assert run.run_dir == tmp_path / "run"
    assert run.data.tokenizer == tmp_path / "run" / "tokenizer"
    assert KosmosTokenizer.load(run.data.tokenizer).fingerprint == KosmosTokenizer.load(tokenizer).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert json.loads((tmp_path / "run" / "conversion.json").read_text())["step"] == 0
    assert StoredTensors(tmp_path / "run" / "checkpoints" / "step_00000000").manifest.step == 0


def test_a_byte_level_tokenizer_comes_back_with_its_ids(tmp_path: Path) -> None:
    import_tokenizer(falcon_like(tmp_path / "falcon", TEXT, vocab_size=300)).save(tmp_path / "tokenizer")
    trained_run(tmp_path / "run", tmp_path / "tokenizer")
    to_hf(tmp_path / "run", tmp_path / "out", ExportOptions(verify=False))
    from_hf(tmp_path / "out", tmp_path / "back", ImportOptions(verify=False))
    before, after = (KosmosTokenizer.load(folder) for folder in (tmp_path / "tokenizer", tmp_path / "back/tokenizer"))
    assert after.encode(TEXT[0]) == before.encode(TEXT[0])
    assert after.vocab_size == before.vocab_size
    for role in ("pad_id", "bos_id", "eos_id", "image_id", "end_of_image_id"):
        assert getattr(after, role) == getattr(before, role)


def test_a_configuration_gives_the_other_settings(exported: Path, tmp_path: Path) -> None:
    sizes = {"model__decoder__vocab_size": 347, "model__decoder__max_sequence_length": 300}
    save_config(tiny_run(run_dir="elsewhere", **sizes, training__seed=17), tmp_path / "run.yaml")
    from_hf(exported, tmp_path / "run", ImportOptions(config=tmp_path / "run.yaml", verify=False))
    run = load_config(tmp_path / "run" / "config.yaml")
    assert (run.training.seed, run.model.decoder.padded_vocab_size, run.run_dir) == (17, 352, tmp_path / "run")


def test_a_configuration_of_another_network_is_refused_with_its_fields(exported: Path, tmp_path: Path) -> None:
    sizes = {"model__decoder__vocab_size": 347, "model__decoder__max_sequence_length": 300}
    save_config(tiny_run(**sizes, model__decoder__width=64, model__vision__activation="gelu"), tmp_path / "run.yaml")
    with pytest.raises(ConversionError) as caught:
        from_hf(exported, tmp_path / "run", ImportOptions(config=tmp_path / "run.yaml"))
    assert "model.decoder.width: 32 in the source, 64 in" in str(caught.value)
    assert "model.vision.activation: 'quick_gelu' in the source, 'gelu' in" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_differing_names_and_shapes_are_all_listed(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["resampler.norms.weight"] = tensors.pop("resampler.norm.weight")
        tensors["resampler.latents"] = tensors["resampler.latents"][:2].clone()

    rewrite(source, change)
    with pytest.raises(NameMapError) as caught:
        from_hf(source, tmp_path / "run")
    for problem in (
        "missing: resampler.norm.weight [16]",
        "left over: resampler.norms.weight [16]",
        "resampler.latents is [2, 16], the model wants [3, 16]",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_model_is_refused(source: Path, tmp_path: Path) -> None:
    """tests/unit/hf/test_folder_weights.py has all that is refused."""
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()
    with pytest.raises(FolderError, match=r"has its weights in pytorch_model\.bin: pickled files"):
        from_hf(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_differ_are_not_put_in_place(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys_for_values(*args: Any) -> Any:
        table = right(*args)
        for entry in table:
            if entry.training_name == "decoder.layers.2.self_attention.linear_qkv.weight":
                query, key, value = entry.hf_names
                object.__setattr__(entry, "hf_names", (query, value, key))
        return table

    right = from_hf_module.table_of
    monkeypatch.setattr(from_hf_module, "table_of", keys_for_values)
    with pytest.raises(ConversionError, match="differ from the source's by"):
        from_hf(exported, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_weights_in_half_precision_become_fp32_masters(source: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    rewrite(source, halve)
    from_hf(source, tmp_path / "run", ImportOptions(verify=False))
    to_hf(tmp_path / "run", tmp_path / "again", ExportOptions(verify=False))
    found = weights_of(tmp_path / "again")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in weights_of(source).items())


def test_an_existing_output_is_refused_before_anything_is_read(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="exists; choose another"):
        from_hf(tmp_path / "nothing", exported)
    before = sorted(exported.iterdir())
    for output in (exported, exported.parent):
        with pytest.raises(ConversionError, match="is to be converted; choose another folder"):
            from_hf(exported, output, ImportOptions(overwrite=True))
        with pytest.raises(ConversionError, match="is to be converted; choose another folder"):
            to_hf(exported.parent / "run", exported.parent / "run", ExportOptions(overwrite=True))
    assert sorted(exported.iterdir()) == before


def test_quantized_weights_are_refused(source: Path, tmp_path: Path) -> None:
    def quantize(tensors: dict[str, Tensor]) -> None:
        tensors["resampler.latents"] = tensors["resampler.latents"].mul(100).to(torch.int8)

    rewrite(source, quantize)
    with pytest.raises(ConversionError, match=r"none of F64, F32, F16, BF16; .*\n  resampler\.latents is I8"):
        from_hf(source, tmp_path / "run")


def test_a_full_disk_ends_every_conversion_in_words(exported: Path, tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        with pytest.raises(ConversionError, match=r"writing .*run failed, so nothing was put in place: .*too large"):
            from_hf(exported, tmp_path / "run", ImportOptions(verify=False))
        with pytest.raises(ConversionError, match=r"writing .*hf failed, so nothing was put in place: .*too large"):
            to_hf(exported.parent / "run", tmp_path / "hf", ExportOptions(verify=False))

    assert run_in_child(fill_the_disk) == 0
    assert not list(tmp_path.iterdir())


def test_the_command_makes_a_run_and_says_when_no_tokenizer_came(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = typer.Typer()
    convert_command.register(app)
    for file in ("tokenizer.model", "kosmos_tokenizer.json"):
        (source / file).unlink()
    with caplog.at_level(logging.WARNING, logger=from_hf_module.__name__):
        result = CliRunner().invoke(app, ["convert", "from-hf", str(source), str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "largest difference of logits" in result.output
    assert "set data.tokenizer in" in caplog.text
    result = CliRunner().invoke(app, ["convert", "from-hf", str(source), str(tmp_path / "run")])
    assert result.exit_code == 1
