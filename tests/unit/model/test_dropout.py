"""Dropout by sixteen random bits: the share, the mean, the gradient, and the places of megatron-core's function."""

import pytest
import torch
from megatron.core.fusions import fused_bias_dropout
from torch import Tensor

from megatron_kosmos.model import dropout as ours
from megatron_kosmos.model.dropout import draw_kept, dropout, get_bias_dropout_add, scale_of_kept

ODD = (257, 1023)
"""A shape whose elements do not fill the last word of random bits."""


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_elements_are_zero_or_scaled_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.ones(ODD, dtype=dtype)
    kept = dropout(x, p, training=True).double()
    dropped, scale = kept.unique().tolist()
    assert dropped == 0.0
    assert scale == pytest.approx(1 / (1 - p), rel=4e-3 if dtype == torch.bfloat16 else 2e-5)
    count = x.numel()
    deviation = 5 * (p * (1 - p) / count) ** 0.5
    assert abs((kept == 0).double().mean() - p) < deviation + 2**-16
    assert scale_of_kept(p) == pytest.approx(1 / (1 - p), abs=2**-15)


def test_the_highest_probability_keeps_one_draw_in_65536() -> None:
    p = 1 - 1e-9
    assert scale_of_kept(p) == 2**16
    assert dropout(torch.ones(ODD), p, training=True).count_nonzero() < 50


def test_every_element_draws_for_itself() -> None:
    torch.manual_seed(2)
    kept = draw_kept(torch.empty(200, 512), 0.5)
    rows = torch.corrcoef(kept[:64])
    columns = torch.corrcoef(kept[:, :64].T)
    for correlations in (rows, columns):
        assert (correlations - torch.eye(64)).abs().max() < 0.4
    assert not torch.equal(kept, draw_kept(torch.empty(200, 512), 0.5))


@pytest.mark.parametrize("p, training", [(0.0, True), (0.1, False)])
def test_nothing_is_dropped_without_a_reason(p: float, training: bool) -> None:
    x, bias, residual = torch.randn(3, *ODD)
    assert torch.equal(dropout(x, p, training), x)
    assert torch.equal(get_bias_dropout_add(training, fused=False)((x, bias[0]), residual, p), residual + (x + bias[0]))


def as_torch_draws(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw what torch's own dropout would keep."""
    assert generator is None
    return (torch.nn.functional.dropout(torch.ones_like(like), p) > 0).to(like.dtype)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, ODD[1], dtype=torch.float64)], ids=["plain", "bias"])
def test_value_and_gradients_are_those_of_megatron_cores_function(
    bias: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "draw_kept", as_torch_draws)
    x, residual, direction = torch.randn(3, *ODD, dtype=torch.float64)
    results = []
    for function in (get_bias_dropout_add(True, fused=False), fused_bias_dropout.get_bias_dropout_add(True, False)):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, residual)]
        torch.manual_seed(3)
        output = function((inputs[0], bias), inputs[1], 0.25)
        output.backward(direction)
        results.append((output.detach(), *(tensor.grad for tensor in inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-12)
