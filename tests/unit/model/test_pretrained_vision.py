"""Starting the vision tower from a CLIP folder, in every way that transformers writes one, and refusing others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_kosmos.config import ConfigError, RunConfig, VisionConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.pretrained_vision import pretrained_vision
from megatron_kosmos.model.vision import clip_config
from megatron_kosmos.parallel.topology import build_topology
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_run

VISION = tiny_run().model.vision
WEIGHTS = "model.safetensors"


def random_tower(vision: VisionConfig = VISION) -> CLIPVisionModel:
    torch.manual_seed(5)
    model = CLIPVisionModel(clip_config(vision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_tower().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def bare_names(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name.removeprefix("vision_model."): one for name, one in tensors.items()})


def prefixed_names(folder: Path) -> None:
    bare_names(folder)
    rewrite(folder, lambda tensors: {f"vision_model.{name}": tensor for name, tensor in tensors.items()})


def half_precision(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})


def whole_clip(folder: Path) -> None:
    """Vision, text and projections, as openai and laion publish them."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(vision_config=clip_config(VISION).to_dict(), text_config=text, projection_dim=8)
    model = CLIPModel(config)
    model.vision_model.load_state_dict(random_tower().state_dict())
    model.save_pretrained(folder)


@pytest.mark.parametrize("style", [bare_names, prefixed_names, half_precision, whole_clip])
def test_weights_are_those_of_the_folder(folder: Path, style: Callable[[Path], None]) -> None:
    style(folder)
    weights = pretrained_vision(VISION, folder)
    expected = random_tower().state_dict()
    assert weights.keys() == expected.keys()
    tolerance = 2e-3 if style is half_precision else 0.0
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        torch.testing.assert_close(weights[name], tensor, atol=tolerance, rtol=tolerance)


def initial_tower(run: RunConfig) -> dict[str, Tensor]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    state: dict[str, Tensor] = chunk.vision_tower.state_dict()
    return state


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_starts_from_the_folder(folder: Path, precision: str) -> None:
    run = tiny_run(model__vision__pretrained=str(folder), training__precision=precision)
    for name, tensor in run_ranks(initial_tower, 1, run)[0].items():
        expected = random_tower().state_dict()[name]
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


def test_another_size_is_refused_with_the_fields_that_differ(folder: Path) -> None:
    wider = VISION.model_copy(update={"width": 24, "num_layers": 2})
    with pytest.raises(ConfigError, match=r"vision\.pretrained=.*clip is another model") as error:
        pretrained_vision(wider, folder)
    assert "model.vision.width=24, the folder has 16" in str(error.value)
    assert "model.vision.num_layers=2, the folder has 3" in str(error.value)
    assert "ffn_width" not in str(error.value)


def test_another_activation_is_refused(folder: Path) -> None:
    """The shapes fit; only the numbers would be wrong. laion's towers want gelu, openai's quick_gelu."""
    with pytest.raises(ConfigError, match=r"model\.vision\.activation=gelu, the folder has quick_gelu"):
        pretrained_vision(VISION.model_copy(update={"activation": "gelu"}), folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_norm_eps", 1e-6, "LayerNorm epsilon 1e-05 is fixed, the folder has 1e-06"),
        ("num_attention_heads", 4, r"model\.vision\.num_heads=2, the folder has 4"),
    ],
)
def test_another_function_of_the_same_weights_is_refused(field: str, value: float, message: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=message):
        pretrained_vision(VISION, folder)


@pytest.mark.parametrize("style", [bare_names, prefixed_names])
def test_weights_that_do_not_fit_are_refused_and_all_listed(folder: Path, style: Callable[[Path], None]) -> None:
    """transformers would draw the missing ones at random and only log it."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: one for name, one in tensors.items() if "layers.2." not in name}
        prefix = "vision_model." if style is prefixed_names else ""
        kept[f"{prefix}encoder.layers.0.mlp.fc3.weight"] = torch.ones(2)
        kept[f"{prefix}pre_layrnorm.weight"] = torch.ones(3)
        return kept

    style(folder)
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=r"does not hold the vision tower") as error:
        pretrained_vision(VISION, folder)
    message = str(error.value)
    assert message.count("missing: ") == 16
    assert "missing: encoder.layers.2.layer_norm1.bias" in message
    assert "encoder.layers.0.mlp.fc3.weight" in message
    assert "pre_layrnorm.weight is [3], the model wants [16]" in message


def test_row_numbers_of_old_files_do_no_harm(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"vision_model.embeddings.position_ids": torch.arange(5)[None]})
    weights = pretrained_vision(VISION, folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in random_tower().state_dict().items())


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_damaged_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"vision\.pretrained=.*clip can't be read"):
        pretrained_vision(VISION, folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"can't be read: .*safetensors"):
        pretrained_vision(VISION, folder)


@pytest.mark.parametrize(
    "content", ['{"hidden_size": "wide"}', '{"vision_config": 3}', "[1]", '{"hidden_size": null}'], ids=str
)
def test_a_configuration_with_wrong_types_is_refused_in_words(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"vision\.pretrained=.*clip can't be read"):
        pretrained_vision(VISION, folder)


@pytest.mark.parametrize(
    "settings",
    [{"image_std": [1, 0, 1]}, {"image_mean": 0.5}, {"image_mean": [0.5]}, {"image_std": ["a"] * 3}],
    ids=str,
)
def test_a_normalization_that_is_none_is_refused(settings: dict[str, Any], folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"vision\.pretrained=.*clip can't be read"):
        pretrained_vision(VISION, folder)


def features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    tower = CLIPVisionModel(clip_config(VISION)).eval()
    tower.load_state_dict(weights)
    with torch.no_grad():
        hidden: Tensor = tower(images).last_hidden_state
    return hidden


@pytest.mark.parametrize("mean, std", [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.0, 0.1, 0.2), (1.0, 2.0, 0.25))])
def test_a_tower_for_images_normalized_otherwise_sees_the_same(
    mean: tuple[float, ...], std: tuple[float, ...], folder: Path
) -> None:
    """laion's ViT-L/14 was trained with mean and standard deviation 0.5, and says so beside its weights."""
    settings = CLIPImageProcessorPil(image_mean=list(mean), image_std=list(std))
    settings.save_pretrained(folder)
    pixels = torch.rand(2, 3, VISION.image_size, VISION.image_size, generator=torch.Generator().manual_seed(3))
    theirs, ours = (
        (pixels - torch.tensor(one)[:, None, None]) / torch.tensor(other)[:, None, None]
        for one, other in ((mean, std), (IMAGE_MEAN, IMAGE_STD))
    )
    expected = features(random_tower().state_dict(), theirs)
    torch.testing.assert_close(features(pretrained_vision(VISION, folder), ours), expected, atol=2e-4, rtol=2e-4)
    assert (features(random_tower().state_dict(), ours) - expected).abs().max() > 0.1


def test_clip_s_own_normalization_changes_no_bit(folder: Path) -> None:
    CLIPImageProcessorPil().save_pretrained(folder)
    weights = pretrained_vision(VISION, folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in random_tower().state_dict().items())


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    with pytest.raises(ConfigError, match=r"nothing is no folder of a CLIP model of .* null to start"):
        pretrained_vision(VISION, folder)
