"""The cross-attention resampler: images apart from each other, dropout in training alone.

That it is transformers' Kosmos2ImageToTextProjection is held in tests/parity.
"""

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn

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
