"""Dropout that costs sixteen random bits an element where there is no CUDA.

torch's own draws a Bernoulli sample an element on the CPU, 6 to 9 ns, twenty times a GELU; this one takes about 1 ns.
On CUDA torch's is used, whose kernel draws and applies at once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_RESOLUTION = 2**16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return `x` with each element zero with probability `p`, the others scaled to the same mean; or `x` itself.

    `p` is rounded to a multiple of 2^-16 below 1 on the CPU, the scale with it.
    """
    if x.is_cuda or not training or p == 0.0:
        return F.dropout(x, p, training)
    return torch.mul(x, draw_kept(x, p)).mul_(scale_of_kept(p))


def get_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Return what megatron-core's layer calls as (output, bias), residual, p: residual + dropout(output + bias).

    Takes the place of megatron-core's function of this name; `fused` asks for its compiled kernel and is not taken up.
    """

    def bias_dropout_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
        output, bias = output_with_bias
        output = output if bias is None else output + bias
        if output.is_cuda or not training or p == 0.0:
            return residual.to(output.dtype) + F.dropout(output, p, training)
        return torch.addcmul(residual.to(output.dtype), output, draw_kept(output, p), value=scale_of_kept(p))

    return bias_dropout_add


def draw_kept(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Return ones where an element is kept and zeros where it is dropped, in the shape and dtype of `like`."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[: like.numel()].view(like.shape)
    # Written in the floating dtype at once: multiplying by bools converts them element by element, six times slower.
    kept = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return torch.ge(draws, _num_dropped(p) - _RESOLUTION // 2, out=kept)


def scale_of_kept(p: float) -> float:
    """Return what kept elements are multiplied by: one over the share that `draw_kept` keeps."""
    return _RESOLUTION / (_RESOLUTION - _num_dropped(p))


def _num_dropped(p: float) -> int:
    return min(round(p * _RESOLUTION), _RESOLUTION - 1)
