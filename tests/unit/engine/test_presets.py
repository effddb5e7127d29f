"""The presets have the sizes of what they are named after, part by part, counted on the meta device in full size."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Kosmos2Config, Kosmos2ForConditionalGeneration

from megatron_kosmos.config import DecoderConfig, RunConfig, load_config
from megatron_kosmos.engine.dry_run import Part, Plan, plan
from tests.parity.oracles import TorchscaleConfig, TorchscaleDecoder

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VISION = {"kosmos1": VIT_L, "kosmos_x": VIT_L, "kosmos2": VIT_L, "modern": VIT_L, "kosmos_13b": VIT_H}


def preset(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@cache
def planned(name: str) -> Plan:
    run = preset(name)
    return plan(run, 1 if name == "kosmos_tiny" else 64)


def count(name: str, *parts: Part) -> int:
    return sum(planned(name).parts[part].total for part in parts)


def padding(name: str) -> int:
    """Parameters of the rows that fill up the vocabulary matrices, of which an untied model has two."""
    decoder = planned(name).run.model.decoder
    matrices = 1 if decoder.tie_embeddings else 2
    return matrices * (decoder.padded_vocab_size - decoder.vocab_size) * decoder.width


def size(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def clip(vision: dict[str, int]) -> int:
    return size(lambda: CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=14, **vision)))


def torchscale(decoder: DecoderConfig) -> int:
    """The size of torchscale's decoder without positions."""
    config = TorchscaleConfig(
        vocab_size=decoder.vocab_size,
        decoder_layers=decoder.num_layers,
        decoder_embed_dim=decoder.width,
        decoder_ffn_embed_dim=decoder.ffn_width,
        decoder_attention_heads=decoder.num_heads,
        share_decoder_input_output_embed=decoder.tie_embeddings,
        subln=True,
    )
    return size(lambda: TorchscaleDecoder(config, embed_tokens=nn.Embedding(decoder.vocab_size, decoder.width)))


@pytest.mark.parametrize("name", ["kosmos1", "kosmos_x", "kosmos_13b"])
def test_the_decoder_is_as_large_as_torchscale_s(name: str) -> None:
    decoder = planned(name).run.model.decoder
    positions = decoder.max_sequence_length * decoder.width if decoder.positions == "learned" else 0
    assert count(name, "embedding", "decoder", "output") - padding(name) == torchscale(decoder) + positions


@pytest.mark.parametrize("name", VISION)
def test_the_tower_is_as_large_as_clip(name: str) -> None:
    assert count(name, "vision") == clip(VISION[name])


@pytest.mark.parametrize("name", VISION)
def test_what_is_frozen_is_what_the_source_freezes(name: str) -> None:
    """The paper: all of CLIP but its last layer. Kosmos-X and KOSMOS-2's recipe: nothing that the model uses."""
    vision = planned(name).run.model.vision
    layer = 4 * vision.width * (vision.width + 1) + vision.ffn_width * (2 * vision.width + 1) + 5 * vision.width
    trained = {"kosmos_x": clip(VIT_L) - 2 * 1024, "kosmos2": clip(VIT_L)}.get(name, layer)
    assert planned(name).parts["vision"].trained == trained
    assert not any(size.frozen for part, size in planned(name).parts.items() if part != "vision")


def test_kosmos2_is_as_large_as_transformers_model_part_by_part() -> None:
    with torch.device("meta"):
        theirs = Kosmos2ForConditionalGeneration(Kosmos2Config())
    whole, projection = (sum(p.numel() for p in m.parameters()) for m in (theirs, theirs.image_to_text_projection))
    assert sum(part.total for part in planned("kosmos2").parts.values()) - padding("kosmos2") == whole == 1_664_485_376
    assert count("kosmos2", "resampler") == projection
    assert planned("kosmos2").run.model.decoder.vocab_size == Kosmos2Config().text_config.vocab_size


def test_modern_differs_from_kosmos1_by_grouped_keys_and_head_norms() -> None:
    decoder = planned("modern").run.model.decoder
    keys_and_values = 2 * (32 - 8) * decoder.head_size * (decoder.width + 1)
    head_norms = 2 * 2 * decoder.head_size
    difference = decoder.num_layers * (head_norms - keys_and_values)
    assert count("modern", "decoder") == count("kosmos1", "decoder") + difference
    assert count("modern", "resampler") == count("kosmos1", "resampler")


def test_the_13b_preset_needs_tensor_and_pipeline_parallelism() -> None:
    """Weights and gradients of a rank fit 80 GB only in parts; the layout leaves room for activations."""
    whole = planned("kosmos_13b")
    assert 12.5e9 < count("kosmos_13b", "decoder") < 13e9
    weights_and_gradients = (2 + 4) * sum(part.trained for part in whole.parts.values())
    assert weights_and_gradients > 80e9
    assert max(stage.memory.total for stage in whole.stages) < 20e9
    assert whole.run.parallel.tensor_parallel_size > 1
    assert whole.run.parallel.pipeline_parallel_size > 1


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "kosmos_tiny"])
def test_stages_are_even_in_training_work(name: str) -> None:
    shares = [stage.training_share for stage in planned(name).stages]
    assert max(shares) * len(shares) < 1.03, shares


@pytest.mark.parametrize("name", PRESETS)
def test_the_documented_counts_are_those_of_the_plan(name: str) -> None:
    documented = (CONFIGS.parent / "docs" / "models.md").read_text(encoding="utf-8")
    (row,) = [line for line in documented.splitlines() if line.startswith(f"| `configs/{name}.yaml`")]
    whole, decoder = sum(part.total for part in planned(name).parts.values()), count(name, "embedding", "decoder")
    assert row.endswith(f"| {whole:,} | {decoder + count(name, 'output'):,} |")
    if name != "kosmos_tiny":
        parts = planned(name).parts
        assert f"{name} | " + " | ".join(f"{parts[part].total:,}" for part in parts) in documented
