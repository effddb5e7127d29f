"""Figures of tensors that are longer than the pieces they are read in."""

import numpy as np
import pytest
import torch

from megatron_kosmos.checkpoint.figures import difference_norm, tensor_figures, update_squares

LENGTH = (1 << 20) + 3
"""Two pieces, the second of which is short."""


@pytest.fixture
def values() -> torch.Tensor:
    tensor = torch.randn(LENGTH, generator=torch.Generator().manual_seed(2)).mul_(1e-4).add_(1)
    tensor[-1], tensor[5] = 7, -3
    return tensor


def test_pieces_are_put_together(values: torch.Tensor) -> None:
    figures, expected = tensor_figures("name", values), values.double().numpy()
    assert (figures.min, figures.max, figures.num_elements) == (-3, 7, LENGTH)
    assert figures.norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    assert figures.mean == pytest.approx(expected.mean(), rel=1e-12)
    assert figures.std == pytest.approx(expected.std(), rel=1e-12)
    assert difference_norm(values, values * 2) == pytest.approx(np.linalg.norm(expected), rel=1e-12)


def test_updates_leave_out_what_had_no_gradient(values: torch.Tensor) -> None:
    squares = values.square()
    squares[:2], values[-1] = 0, torch.nan
    total, count = update_squares(values, squares * 4)
    assert count == LENGTH - 3
    assert total == pytest.approx(count / 4, rel=1e-6)


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.empty(0, 4), torch.tensor([True, False])])
def test_any_shape_and_dtype_has_figures(tensor: torch.Tensor) -> None:
    figures = tensor_figures("name", tensor)
    assert (figures.shape, figures.num_nan, figures.num_inf) == (tuple(tensor.shape), 0, 0)
    assert figures.max == (tensor.double().max().item() if tensor.numel() else None)
