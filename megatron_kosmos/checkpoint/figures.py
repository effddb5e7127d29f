"""What is told of a tensor instead of its elements: norm, range, mean and spread, and how it differs from another.

Everything is summed in float64 over pieces of the tensor, so that a bf16 weight is measured as exactly as an fp32 one
and nothing of the tensor's own size is made beside it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 20
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True)
class TensorFigures:
    """A tensor in a few numbers. Those but the counts are of its finite elements, None where it has none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_nan: int
    num_inf: int
    norm: float
    """Root of the sum of squares."""
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    """Root of the mean square distance from the mean."""

    @property
    def num_elements(self) -> int:
        """Finite or not."""
        return math.prod(self.shape)

    @property
    def max_abs(self) -> float:
        """Largest absolute value of a finite element; 0 without one."""
        return max(abs(self.min or 0.0), abs(self.max or 0.0))


def tensor_figures(name: str, tensor: Tensor) -> TensorFigures:
    """Measure a tensor of any dtype."""
    squares = total = 0.0
    count = num_nan = num_inf = 0
    lowest, highest = math.inf, -math.inf
    for piece in _pieces(tensor):
        finite = _finite(piece)
        if finite.numel() < piece.numel():
            num_nan += int(piece.isnan().sum())
            num_inf += int(piece.isinf().sum())
        if finite.numel():
            squares += finite.dot(finite).item()
            total += finite.sum().item()
            lowest, highest = min(lowest, finite.min().item()), max(highest, finite.max().item())
            count += finite.numel()
    mean = total / count if count else None
    return TensorFigures(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        num_bytes=tensor.nbytes,
        num_nan=num_nan,
        num_inf=num_inf,
        norm=math.sqrt(squares),
        min=lowest if count else None,
        max=highest if count else None,
        mean=mean,
        std=None if mean is None else math.sqrt(_squares_around(mean, tensor) / count),
    )


def _squares_around(mean: float, tensor: Tensor) -> float:
    # A pass of its own: mean square minus squared mean loses the spread of a norm's weights, which lie close to 1.
    return sum((_finite(piece) - mean).square().sum().item() for piece in _pieces(tensor))


def update_squares(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[float, int]:
    """Return the sum of squares of exp_avg / √exp_avg_sq and how many elements it is over.

    Elements without a gradient so far, where exp_avg_sq is 0, are left out, and those that aren't finite.
    """
    squares, count = 0.0, 0
    for first, second in zip(_pieces(exp_avg), _pieces(exp_avg_sq), strict=True):
        known = first.isfinite() & second.isfinite() & (second > 0)
        squares += first.square().div_(second).where(known, 0.0).sum().item()
        count += int(known.sum())
    return squares, count


def are_identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: 0 and -0 differ, a NaN equals itself."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))
    )


def difference_norm(one: Tensor, other: Tensor) -> float:
    """Return ‖one − other‖ of two tensors of one shape; NaN where an element of either is not finite."""
    squares = sum((mine - its).square().sum().item() for mine, its in zip(_pieces(one), _pieces(other), strict=True))
    return math.sqrt(squares) if math.isfinite(squares) else math.nan


def _finite(piece: Tensor) -> Tensor:
    # A sum tells at once that all are finite, as nearly always; picking elements takes far longer.
    return piece if piece.sum().isfinite() else piece[piece.isfinite()]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    for piece in tensor.reshape(-1).split(_PIECE):
        yield piece.double()
