"""A tower that open_clip saved becomes ours: the same features of every patch, in each style and normalization."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_kosmos.config import ConfigError, VisionConfig
from megatron_kosmos.model.pretrained_vision import pretrained_vision
from megatron_kosmos.model.vision import VisionTower, clip_config
from megatron_kosmos.prompt import IMAGE_MEAN, IMAGE_STD
from tests.parity.oracles import randomized
from tests.parity.oracles_open_clip import QuickGELU, VisionTransformer

pytestmark = pytest.mark.parity

SIDE, WIDTH, HEADS, LAYERS, PATCH = 16, 24, 3, 2, 4
LAION_MEAN = LAION_STD = (0.5, 0.5, 0.5)
"""open_clip's `laion2b_s32b_b82k`, the laion ViT-L/14."""
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXT_SIDE = ("token_embedding.weight", "text_projection", "transformer.resblocks.0.ln_1.weight", "logit_scale")


def settings(activation: str = "gelu") -> VisionConfig:
    return VisionConfig.model_validate(
        {
            "width": WIDTH,
            "ffn_width": 4 * WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "image_size": SIDE,
            "patch_size": PATCH,
            "activation": activation,
        }
    )


def open_clip_tower(activation: str) -> nn.Module:
    tower = VisionTransformer(
        **{"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_ratio": 4.0},
        act_layer=QuickGELU if activation == "quick_gelu" else nn.GELU,
        output_dim=10,
    )
    tower.ln_post = nn.Identity()  # what it gives beside the pooled features then is the last layer's output
    tower.output_tokens = True
    return randomized(tower.eval(), 11)


def write(folder: Path, activation: str, vision: dict[str, Any] | None = None, **preprocessing: Any) -> nn.Module:
    """Write what open_clip's `push_to_hf_hub` does of a CLIP: the tower with the text side, and both settings."""
    folder.mkdir(exist_ok=True)
    tower = open_clip_tower(activation)
    tensors = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name in ("weight", "bias"):
        tensors[f"visual.ln_post.{name}"] = torch.ones(WIDTH)
    tensors |= {name: torch.ones(3) for name in TEXT_SIDE}
    save_file(tensors, folder / WEIGHTS)
    sizes = {"image_size": SIDE, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    model = {"embed_dim": 10, "vision_cfg": sizes | (vision or {}), "text_cfg": {"width": 8}}
    if activation == "quick_gelu":
        model["quick_gelu"] = True
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocessing}))
    return tower


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def features(folder: Path, activation: str, pixels: Tensor) -> Tensor:
    """Return what our tower makes of images as the data has them."""
    tower = VisionTower(settings(activation)).eval()
    tower.load_state_dict(pretrained_vision(settings(activation), folder))
    hidden: Tensor = tower(normalized(pixels, IMAGE_MEAN, IMAGE_STD))
    return hidden


def transformers_settings(folder: Path) -> None:
    """The same weights under transformers' file name, with transformers' configuration, as a user may have them."""
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    (folder / CONFIG).unlink()
    clip_config(settings("quick_gelu")).save_pretrained(folder)


@pytest.mark.parametrize(
    ("activation", "mean", "std", "change"),
    [
        ("gelu", LAION_MEAN, LAION_STD, None),
        ("quick_gelu", IMAGE_MEAN, IMAGE_STD, None),
        ("quick_gelu", IMAGE_MEAN, IMAGE_STD, transformers_settings),
    ],
    ids=["laion", "openai", "openai, transformers' settings"],
)
def test_features_are_those_of_open_clip(
    activation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    change: Callable[[Path], None] | None,
    tmp_path: Path,
) -> None:
    oracle = write(tmp_path / "clip", activation, mean=list(mean), std=list(std))
    if change is not None:
        change(tmp_path / "clip")
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        _, patches = oracle(normalized(pixels, mean, std))
    found = features(tmp_path / "clip", activation, pixels)[:, 1:]  # open_clip gives all but the class token
    assert patches.std() > 0.1
    torch.testing.assert_close(found, patches, atol=2e-5, rtol=2e-5)


def test_the_other_activation_is_refused(tmp_path: Path) -> None:
    """The shapes fit. open_clip's default is gelu, and OpenAI's weights say quick_gelu."""
    write(tmp_path / "clip", "gelu")
    with pytest.raises(ConfigError, match=r"model\.vision\.activation=quick_gelu, the folder has gelu"):
        pretrained_vision(settings("quick_gelu"), tmp_path / "clip")
    write(tmp_path / "clip", "quick_gelu")
    with pytest.raises(ConfigError, match=r"model\.vision\.activation=gelu, the folder has quick_gelu"):
        pretrained_vision(settings("gelu"), tmp_path / "clip")


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"width": 48}, r"model\.vision\.width=24, the folder has 48"),
        ({"mlp_ratio": 3.0}, r"model\.vision\.ffn_width=96, the folder has 72"),
        ({"head_width": 4}, r"model\.vision\.num_heads=3, the folder has 6"),
        ({"qk_norm": True, "ls_init_value": 0.1}, r"another kind of tower: vision_cfg has qk_norm=True, ls_init_value"),
        ({"layers": [3, 4, 6, 3]}, r"no square vision transformer: vision_cfg has layers=\[3, 4, 6, 3\]"),
        ({"patch_dropout": 0.5, "norm_kwargs": None, "pos_embed_type": "learnable"}, None),
    ],
    ids=str,
)
def test_another_tower_is_refused_with_what_differs(
    vision: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    write(tmp_path / "clip", "gelu", vision)
    if message is None:
        pretrained_vision(settings(), tmp_path / "clip")
        return
    with pytest.raises(ConfigError, match=message):
        pretrained_vision(settings(), tmp_path / "clip")


def test_weights_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    write(tmp_path / "clip", "gelu")
    tensors = load_file(tmp_path / "clip" / WEIGHTS)
    del tensors["visual.transformer.resblocks.1.attn.in_proj_weight"]
    tensors["visual.transformer.resblocks.0.ls_1.gamma"] = torch.ones(WIDTH)
    tensors["visual.positional_embedding"] = torch.ones(5, WIDTH)
    save_file(tensors, tmp_path / "clip" / WEIGHTS)
    with pytest.raises(ConfigError, match="does not hold the vision tower") as error:
        pretrained_vision(settings(), tmp_path / "clip")
    for problem in (
        "missing: encoder.layers.1.self_attn.k_proj.weight",
        "left over: encoder.layers.0.ls_1.gamma",
        "embeddings.position_embedding.weight is [5, 24], the model wants [17, 24]",
    ):
        assert problem in str(error.value)
    assert str(error.value).count("\n") == 5
