"""A Kosmos-X model built from torchscale, CLIP and flamingo-pytorch becomes a run that computes the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.checkpoint.load import StoredTensors
from megatron_kosmos.cli import convert as convert_command
from megatron_kosmos.config import ModelConfig, PerceiverConfig, load_config, save_config
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX
from megatron_kosmos.engine.conversion import ConversionError
from megatron_kosmos.engine.from_torchscale import TorchscaleOptions, from_torchscale
from megatron_kosmos.engine.verify_conversion import training_logits, verification_batch
from megatron_kosmos.hf.name_map import NameMapError
from megatron_kosmos.model.vision import clip_config
from tests.distributed.tiny import tiny_run
from tests.parity.oracles import flamingo_resampler, randomized, torchscale_decoder

pytestmark = pytest.mark.parity

VARIANTS: dict[str, dict[str, Any]] = {
    "kosmos_x": {"positions": "learned"},
    "tied": {"tie_embeddings": True},
    "scaled, no xpos": {"xpos": False, "positions": "learned", "scale_embeddings": True},
}


class KosmosX(nn.Module):
    """The model of Kosmos-X's README: its modules by its names, and its forward for images anywhere."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert isinstance(model.resampler, PerceiverConfig)
        self.model = model
        self.clip_model = randomized(CLIPVisionModel(clip_config(model.vision)).eval(), 1)
        self.decoder = torchscale_decoder(model.decoder, 2).float()
        self.embed = self.decoder.get_submodule("embed_tokens")
        self.embed_positions, self.output_projection = self.decoder.embed_positions, self.decoder.output_projection
        self.perceive = flamingo_resampler(model.resampler, model.vision.width, 3).float()
        self.image_proj = randomized(nn.Linear(model.vision.width, model.decoder.width, bias=False), 4)

    @torch.no_grad()
    def logits(self, batch: MultimodalBatch) -> Tensor:
        """Return the logits [B, T, V]."""
        patches = self.clip_model(batch.images).last_hidden_state
        embedded = self.embed(batch.input_ids)
        images = self.image_proj(self.perceive(patches).squeeze(1))
        embedded[batch.slots(self.model.resampler.num_latents)] = images.flatten(0, 1)
        logits: Tensor = self.decoder(batch.input_ids, token_embeddings=embedded)[0]
        return logits


def torchscale_settings(model: ModelConfig) -> dict[str, Any]:
    decoder = model.decoder
    return {
        "vocab_size": decoder.vocab_size,
        "decoder_layers": decoder.num_layers,
        "decoder_embed_dim": decoder.width,
        "decoder_ffn_embed_dim": decoder.ffn_width,
        "decoder_attention_heads": decoder.num_heads,
        "share_decoder_input_output_embed": decoder.tie_embeddings,
        "no_scale_embedding": not decoder.scale_embeddings,
        "xpos_rel_pos": decoder.xpos,
        "subln": True,
        "max_rel_pos": 2048,
    }


def made(folder: Path, variant: str = "kosmos_x") -> tuple[Path, TorchscaleOptions, KosmosX]:
    """Write a state dict, its JSON and a run's YAML."""
    changes = {f"model__decoder__{field}": value for field, value in VARIANTS[variant].items()}
    run = tiny_run(**changes)
    oracle = KosmosX(run.model)
    torch.save(oracle.state_dict(), folder / "kosmos_x.pt")
    save_config(run, folder / "run.yaml")
    (folder / "torchscale.json").write_text(json.dumps(torchscale_settings(run.model)))
    return folder / "kosmos_x.pt", TorchscaleOptions(folder / "torchscale.json", folder / "run.yaml"), oracle


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


@pytest.mark.parametrize("variant", ["kosmos_x", "scaled, no xpos", pytest.param("tied", marks=pytest.mark.nightly)])
def test_the_run_computes_what_torchscale_does(variant: str, tmp_path: Path) -> None:
    source, options, oracle = made(tmp_path, variant)
    report = from_torchscale(source, tmp_path / "out", options)
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff <= 1e-5
    run = load_config(tmp_path / "out" / "config.yaml")
    stored = StoredTensors(tmp_path / "out" / "checkpoints" / "step_00000000")
    found = training_logits(run, lambda name: stored.read(MODEL_PREFIX + name))
    expected = oracle.logits(verification_batch(run.model))
    assert expected.std() > 0.1
    assert float((found - expected).abs().max()) <= 1e-5


def test_other_styles_of_names_are_the_same_model(tmp_path: Path) -> None:
    source, options, _ = made(tmp_path)
    from_torchscale(source, tmp_path / "one", options)
    copies = ("embed.", "embed_positions.", "output_projection.")

    def other_style(state: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder.embed", "decoder.out"))}
        assert any(name.startswith(copies) for name in kept)
        return {
            name.removeprefix("decoder.").replace("clip_model.", "clip_model.vision_model."): tensor
            for name, tensor in kept.items()
        }

    rewrite(source, other_style)
    from_torchscale(source, tmp_path / "other", options)
    one, other = (StoredTensors(tmp_path / name / "checkpoints" / "step_00000000") for name in ("one", "other"))
    assert one.shapes == other.shapes
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.shapes)


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    source, options, _ = made(tmp_path)

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["perceive.layers.0.0.to_v.weight"] = state.pop("perceive.layers.0.0.to_kv.weight")
        state["decoder.embed_positions.weight"] = state.pop("embed_positions.weight")[:-2].clone()
        return state

    rewrite(source, change)
    with pytest.raises(NameMapError) as caught:
        from_torchscale(source, tmp_path / "out", options)
    for problem in (
        "missing: perceive.layers.0.0.to_kv.weight [32, 16]",
        "left over: perceive.layers.0.0.to_v.weight [32, 16]",
        "decoder.embed_positions.weight is [24, 32], the model wants [26, 32]",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variant", "copy", "original"),
    [
        ("kosmos_x", "embed.weight", "decoder.embed_tokens.weight"),
        ("kosmos_x", "decoder.output_projection.weight", None),
        ("tied", "decoder.output_projection.weight", "decoder.embed_tokens.weight"),
    ],
)
def test_copies_that_differ_are_refused(variant: str, copy: str, original: str | None, tmp_path: Path) -> None:
    """Also a tied output that is not the embedding: then the settings are another model's. Untied it is a copy, too."""
    source, options, _ = made(tmp_path, variant)
    rewrite(source, lambda state: state | {copy: state[copy] + 1})
    with pytest.raises(NameMapError, match=rf"{copy} is not {original}" if original else "output_projection"):
        from_torchscale(source, tmp_path / "out", options)


def test_other_settings_are_refused_by_field(tmp_path: Path) -> None:
    source, options, _ = made(tmp_path)
    settings = json.loads(options.torchscale_config.read_text()) | {"deepnorm": True, "decoder_layers": 5}
    del settings["xpos_rel_pos"]
    options.torchscale_config.write_text(json.dumps(settings))
    with pytest.raises(ConversionError) as caught:
        from_torchscale(source, tmp_path / "out", options)
    for problem in (
        "deepnorm=True: this decoder has False",
        "decoder_layers=5: model.decoder.num_layers is 4",
        "xpos_rel_pos=False (torchscale's default): model.decoder.xpos is True",
    ):
        assert problem in str(caught.value)


class Trap:
    """An object that would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch trap_was_sprung",)


@pytest.mark.parametrize(
    "content", [{"decoder": Trap()}, b"no file of torch", {"model": {"decoder.a": torch.ones(1)}}, {7: torch.ones(1)}]
)
def test_files_that_hold_more_than_tensors_are_refused(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options, _ = made(tmp_path)
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content, source)
    with pytest.raises(ConversionError, match=r"save(s)? model\.state_dict\(\)|Save model\.state_dict\(\)"):
        from_torchscale(source, tmp_path / "out", options)
    assert not (tmp_path / "trap_was_sprung").exists()


def test_the_command_converts_and_fails_in_words(tmp_path: Path) -> None:
    source, options, _ = made(tmp_path)
    app = typer.Typer()
    convert_command.register(app)
    arguments = ["--torchscale-config", str(options.torchscale_config), "--config", str(options.config)]
    result = CliRunner().invoke(app, ["convert", "from-torchscale", str(source), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    assert "largest difference of logits" in result.output
    over = ["convert", "from-torchscale", str(source), str(tmp_path), *arguments, "--overwrite"]
    assert "is to be converted" in str(CliRunner().invoke(app, over).exception)
    assert source.is_file()
    result = CliRunner().invoke(app, ["convert", "from-torchscale", str(tmp_path), str(tmp_path / "new"), *arguments])
    assert result.exit_code == 1
