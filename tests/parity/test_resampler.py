"""The perceiver resampler is flamingo-pytorch's."""

import pytest
import torch

from megatron_kosmos.config import PerceiverConfig
from megatron_kosmos.model.resampler import PerceiverResampler
from tests.parity.oracles import flamingo_resampler, gradients_of, resampler_names

pytestmark = pytest.mark.parity

WIDTH = 24
CONFIGS = [
    PerceiverConfig(kind="perceiver", depth=2, num_latents=5, num_heads=3, head_size=8, ffn_multiplier=4),
    PerceiverConfig(kind="perceiver", depth=1, num_latents=7, num_heads=2, head_size=16, ffn_multiplier=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["depth2", "depth1_wide_heads"])
def test_outputs_and_gradients_are_those_of_flamingo_pytorch(config: PerceiverConfig) -> None:
    oracle = flamingo_resampler(config, WIDTH, seed=1)
    model = PerceiverResampler(config, WIDTH, decoder_width=10).double()
    renamed = resampler_names(oracle.state_dict())
    left = model.load_state_dict(renamed, strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["projection.weight"], [])

    draw = torch.Generator().manual_seed(2)
    patches = torch.randn(3, 17, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    same_patches = patches.detach().clone().requires_grad_()
    expected = oracle(patches).squeeze(1)
    actual = model.resample(same_patches)
    direction = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()

    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(same_patches.grad, patches.grad, rtol=0, atol=1e-10)
    gradients = resampler_names(gradients_of(oracle))
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-3, name
        assert (ours[name] - gradient).abs().max() <= 1e-10, name


def test_the_projection_comes_after_the_last_norm() -> None:
    model = PerceiverResampler(CONFIGS[0], WIDTH, decoder_width=10).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    patches = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(patches), model.resample(patches) @ model.projection.weight.T)
