"""The vision tower: transformers' CLIP to its last hidden state, and a frozen part that builds no graph."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

from megatron_kosmos.config import VisionConfig
from megatron_kosmos.model.vision import VisionTower, clip_config

LAYERS = 3


def config(
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu", features: Literal["hidden", "normalized"] = "hidden"
) -> VisionConfig:
    return VisionConfig(
        width=16,
        ffn_width=40,
        num_layers=LAYERS,
        num_heads=2,
        image_size=24,
        patch_size=8,
        activation=activation,
        features=features,
    )


def towers(vision: VisionConfig, num_frozen: int = 0) -> tuple[VisionTower, CLIPVisionModel]:
    """Return our tower and transformers' own with the same random weights, none of them at a trivial value."""
    torch.manual_seed(1)
    tower, reference = VisionTower(vision), CLIPVisionModel(clip_config(vision))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tower.load_state_dict(reference.state_dict())
    if num_frozen:
        for module in (tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[:num_frozen]):
            module.requires_grad_(False)
    return tower, reference


def pictures() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("frozen_layers", range(LAYERS + 1))
def test_it_is_transformers_last_hidden_state(frozen_layers: int, activation: Literal["quick_gelu", "gelu"]) -> None:
    tower, reference = towers(config(activation), frozen_layers)
    patches = tower(pictures())
    assert patches.shape == (2, 10, 16)  # the class token is kept
    torch.testing.assert_close(patches, reference(pictures()).last_hidden_state, atol=1e-6, rtol=1e-6)


def test_the_activation_matters() -> None:
    tower, _ = towers(config())
    other = VisionTower(config(activation="gelu"))
    other.load_state_dict(tower.state_dict())
    assert (tower(pictures()) - other(pictures())).abs().max() > 1e-3


def test_post_layernorm_takes_no_part() -> None:
    tower, _ = towers(config())
    before = tower(pictures())
    with torch.no_grad():
        tower.post_layernorm.weight.fill_(7.0)
    assert torch.equal(tower(pictures()), before)
    before.sum().backward()
    assert not tower.post_layernorm.weight.requires_grad
    assert tower.post_layernorm.weight.grad is None


def kosmos2_features(reference: CLIPVisionModel) -> Tensor:
    """Return what transformers' Kosmos2Model hands to its projection: every token's, of length one."""
    return F.normalize(reference.post_layernorm(reference(pictures()).last_hidden_state), dim=-1)


@pytest.mark.parametrize("frozen_layers", [0, LAYERS])
def test_normalized_features_train_post_layernorm(frozen_layers: int) -> None:
    tower, reference = towers(config(features="normalized"), frozen_layers)
    features, expected = tower(pictures()), kosmos2_features(reference)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = dict(reference.named_parameters())
    trained = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert {"post_layernorm.weight", "post_layernorm.bias"} <= trained
    assert len(trained) == (2 if frozen_layers else len(theirs))
    for name in trained:
        torch.testing.assert_close(tower.get_parameter(name).grad, theirs[name].grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("frozen_layers", range(1, LAYERS + 1))
def test_frozen_layers_build_no_graph_and_get_no_gradient(frozen_layers: int) -> None:
    tower, _ = towers(config(), frozen_layers)
    builds_graph: list[bool] = []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: builds_graph.append(output.requires_grad))
    patches = tower(pictures())
    assert builds_graph == [number >= frozen_layers for number in range(LAYERS)]
    if frozen_layers < LAYERS:
        patches.square().sum().backward()
    for name, parameter in tower.named_parameters():
        trained = [f"encoder.layers.{number}." for number in range(frozen_layers, LAYERS)]
        assert parameter.requires_grad == name.startswith(tuple(trained)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("frozen_layers", range(LAYERS))
def test_trained_layers_get_transformers_gradients(frozen_layers: int) -> None:
    tower, reference = towers(config(), frozen_layers)
    tower(pictures()).square().sum().backward()
    reference(pictures()).last_hidden_state.square().sum().backward()
    expected = dict(reference.named_parameters())
    trained = [(name, parameter) for name, parameter in tower.named_parameters() if parameter.requires_grad]
    assert len(trained) == 16 * (LAYERS - frozen_layers) + (5 if frozen_layers == 0 else 0)
    for name, parameter in trained:
        gradient = expected[name].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-5, msg=name)


def test_weights_can_be_exchanged_with_transformers_both_ways() -> None:
    tower, reference = towers(config(), 2)
    assert tower.state_dict().keys() == reference.state_dict().keys()
    reference.load_state_dict(tower.state_dict(), strict=True)


def test_evaluation_builds_no_graph_at_all() -> None:
    tower, _ = towers(config())
    with torch.no_grad():
        assert not tower(pictures()).requires_grad
