"""The vision tower: what is frozen builds no graph, and weights are transformers'.

That features and gradients are those of transformers' CLIP is held in tests/parity.
"""

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from megatron_kosmos.config import VisionConfig
from megatron_kosmos.model.vision import VisionTower, clip_config

LAYERS = 3
CONFIG = VisionConfig(width=16, ffn_width=40, num_layers=LAYERS, num_heads=2, image_size=24, patch_size=8)


def tower_with(num_frozen: int) -> VisionTower:
    """Return a tower of which the first `num_frozen` layers, and what is below them, are frozen."""
    torch.manual_seed(1)
    tower = VisionTower(CONFIG)
    if num_frozen:
        for module in (tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[:num_frozen]):
            module.requires_grad_(False)
    return tower


def pictures() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))


def test_post_layernorm_takes_no_part() -> None:
    tower = tower_with(num_frozen=0)
    before = tower(pictures())
    with torch.no_grad():
        tower.post_layernorm.weight.fill_(7.0)
    assert torch.equal(tower(pictures()), before)
    before.sum().backward()
    assert not tower.post_layernorm.weight.requires_grad
    assert tower.post_layernorm.weight.grad is None


@pytest.mark.parametrize("num_frozen", range(1, LAYERS + 1))
def test_frozen_layers_build_no_graph_and_get_no_gradient(num_frozen: int) -> None:
    tower = tower_with(num_frozen)
    builds_graph: list[bool] = []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: builds_graph.append(output.requires_grad))
    patches = tower(pictures())
    assert builds_graph == [number >= num_frozen for number in range(LAYERS)]
    if num_frozen < LAYERS:
        patches.square().sum().backward()
    for name, parameter in tower.named_parameters():
        trained = [f"encoder.layers.{number}." for number in range(num_frozen, LAYERS)]
        assert parameter.requires_grad == name.startswith(tuple(trained)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_weights_can_be_exchanged_with_transformers_both_ways() -> None:
    tower, theirs = VisionTower(CONFIG), CLIPVisionModel(clip_config(CONFIG))
    tower.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(tower.state_dict(), strict=True)
