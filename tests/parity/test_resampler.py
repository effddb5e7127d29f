"""The perceiver resampler is flamingo-pytorch's."""

import pytest
import torch

from megatron_kosmos.config import PerceiverConfig
from megatron_kosmos.model.resampler import PerceiverResampler
from tests.parity.fidelity import Record
from tests.parity.oracles import flamingo_resampler, gradients_of, resampler_names
from tests.parity.ours import FP32, FP64

pytestmark = pytest.mark.parity

WIDTH = 24
CONFIGS = {
    "depth2": PerceiverConfig(kind="perceiver", depth=2, num_latents=5, num_heads=3, head_size=8, ffn_multiplier=4),
    "wide": PerceiverConfig(kind="perceiver", depth=1, num_latents=7, num_heads=2, head_size=16, ffn_multiplier=2),
}
BOUNDS = {FP32: 1e-6, FP64: 1e-10}


@pytest.mark.parametrize("config, precision", [("depth2", FP64), ("wide", FP64), ("wide", FP32)])
def test_outputs_and_gradients_are_those_of_flamingo_pytorch(fidelity: Record, config: str, precision: str) -> None:
    dtype = torch.float32 if precision == FP32 else torch.float64
    oracle = flamingo_resampler(CONFIGS[config], WIDTH, seed=1).to(dtype)
    model = PerceiverResampler(CONFIGS[config], WIDTH, decoder_width=10).to(dtype)
    left = model.load_state_dict(resampler_names(oracle.state_dict()), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["projection.weight"], [])

    draw = torch.Generator().manual_seed(2)
    patches = torch.randn(3, 17, WIDTH, generator=draw, dtype=dtype, requires_grad=True)
    same_patches = patches.detach().clone().requires_grad_()
    expected = oracle(patches).squeeze(1)
    actual = model.resample(same_patches)
    direction = torch.randn(expected.shape, generator=draw, dtype=dtype)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()

    assert patches.grad is not None
    assert same_patches.grad is not None
    gradients = resampler_names(gradients_of(oracle)) | {"input": patches.grad}
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    with_flamingo = fidelity.of("flamingo-pytorch `PerceiverResampler`", precision)
    with_flamingo.values("outputs", actual, expected, BOUNDS[precision])
    with_flamingo.gradients(ours | {"input": same_patches.grad}, gradients, BOUNDS[precision])


def test_the_projection_comes_after_the_last_norm() -> None:
    model = PerceiverResampler(CONFIGS["depth2"], WIDTH, decoder_width=10).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    patches = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(patches), model.resample(patches) @ model.projection.weight.T)
