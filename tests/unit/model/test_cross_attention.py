"""The cross-attention resampler: transformers' Kosmos2ImageToTextProjection, dropout in training alone."""

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from transformers import Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from megatron_kosmos.config import CrossAttentionConfig, ParallelConfig
from megatron_kosmos.model.cross_attention import CrossAttentionResampler
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks

E, D, HEADS, LATENTS, PATCHES = 12, 32, 4, 5, 9


def resampler(dropout: float = 0.0) -> CrossAttentionResampler:
    """Return one with random weights, none of them at a trivial value."""
    config = CrossAttentionConfig(
        kind="cross_attention", num_latents=LATENTS, num_heads=HEADS, attention_dropout=dropout
    )
    draw = torch.Generator().manual_seed(1)
    ours = CrossAttentionResampler(config, E, D)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    return ours


def features() -> Tensor:
    return torch.randn(3, PATCHES, E, generator=torch.Generator().manual_seed(2))


def theirs(ours: CrossAttentionResampler) -> Kosmos2ImageToTextProjection:
    config = Kosmos2Config(
        text_config={"embed_dim": D, "attention_heads": HEADS, "attention_dropout": 0.0},
        vision_config={"hidden_size": E},
        latent_query_num=LATENTS,
    )
    config._attn_implementation = "eager"
    reference = Kosmos2ImageToTextProjection(config)
    renamed = {
        name.replace("latents", "latent_query").replace("projection", "dense").replace("attention", "x_attn"): weight
        for name, weight in ours.state_dict().items()
    }
    reference.load_state_dict(renamed, strict=True)
    return reference


def test_it_is_transformers_projection_of_kosmos_2() -> None:
    ours = resampler().double()
    reference = theirs(ours).double()
    patches = features().double()
    output, (expected, _) = ours(patches), reference(patches)
    assert output.shape == (3, LATENTS, D)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in zip(
        (ours.latents, ours.projection.weight, ours.attention.k_proj.weight, ours.attention.out_proj.bias),
        (
            reference.latent_query,
            reference.dense.weight,
            reference.x_attn.k_proj.weight,
            reference.x_attn.out_proj.bias,
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-11, rtol=1e-11)


def test_images_do_not_see_each_other() -> None:
    ours = resampler()
    together = ours(features())
    torch.testing.assert_close(together[1:2], ours(features()[1:2]), atol=1e-6, rtol=1e-6)


def outputs_by_mode(dropout: float) -> dict[str, Tensor]:
    """Return what one image becomes on this of two tensor ranks."""
    topology = build_topology(ParallelConfig(tensor_parallel_size=2), torch.device("cpu"))
    model_parallel_cuda_manual_seed(0)
    module = resampler(dropout)
    outputs = {}
    for mode, microbatch in (("trained", 0), ("again", 0), ("next", 1)):
        seed_microbatch(0, 0, microbatch, 0, topology)
        outputs[mode] = module.train()(features()).detach()
    outputs["default_stream"] = torch.rand(1)
    seed_microbatch(0, 0, 1, 0, topology)
    outputs["default_stream_untouched"] = torch.rand(1)
    return {**outputs, "evaluated": module.eval()(features()).detach()}


@pytest.mark.distributed
def test_dropout_differs_between_tensor_ranks_which_hold_different_images() -> None:
    first, second = run_ranks(outputs_by_mode, 2, 0.3)
    plain = resampler()(features()).detach()
    for rank in (first, second):
        assert torch.equal(rank["trained"], rank["again"])
        assert not torch.equal(rank["trained"], rank["next"])
        assert not torch.equal(rank["trained"], rank["evaluated"])
        assert torch.equal(rank["evaluated"], plain)
        assert torch.equal(rank["default_stream"], rank["default_stream_untouched"])
    assert not torch.equal(first["trained"], second["trained"])
