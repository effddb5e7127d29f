"""AdamW with moments in 8 bits: bitsandbytes' (arXiv 2110.02861), made to fit ZeRO and checkpoints.

A moment is cut into blocks of 256 elements; each keeps its largest magnitude in fp32 and for every element the number
of one of 256 fixed fractions of that. Letters: N elements, K blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor

from megatron_kosmos.optim.groups import KEEPS_32_BITS

BLOCK = 256
"""Elements that share a scale; fixed in bitsandbytes' optimizers."""

_NUMBER = {"exp_avg": "1", "exp_avg_sq": "2"}
"""What bitsandbytes calls the moments: `state1` with `absmax1` and the fractions `qmap1`, and so on."""

_BLOCKS_AT_ONCE = 2**14
"""Quantizing takes 16 bytes an element for the moment."""


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW, in which a torch group says whether its moments have 8 bits or 32.

    bitsandbytes decides by a tensor's address or size, but ZeRO replaces the tensors by its flat partitions.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a tensor of `group`; bitsandbytes asks for them when it makes and updates moments."""
        bits = 32 if group[KEEPS_32_BITS] else 8
        return group | {"optim_bits": bits, "min_8bit_size": 0, "max_unorm": 0.0, "skip_zeros": False}


class EightBitMoments:
    """Access to the moments of an AdamW8bit (`adamw.Moments`), in fp32 whatever they are kept in."""

    def __init__(self, adamw: AdamW8bit) -> None:
        """Look after the moments of `adamw`."""
        self._adamw = adamw

    def create(self, flat: Tensor, group: dict[str, Any]) -> None:
        """Make zero moments for `flat`, a tensor that AdamW updates with the settings of `group`."""
        self._adamw.init_state(group, flat, 0, 0)

    def read(self, flat: Tensor, name: str, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of a moment in fp32; only their blocks are dequantized."""
        state, number = self._adamw.state[flat], _NUMBER[name]
        stored = state[f"state{number}"].view(-1)
        if stored.dtype != torch.uint8:
            return stored[start : start + length]
        first, end = start // BLOCK, -(-(start + length) // BLOCK)
        codes, scales = stored[first * BLOCK : end * BLOCK], state[f"absmax{number}"][first:end]
        return dequantize(codes, scales, state[f"qmap{number}"])[start - first * BLOCK :][:length]

    @contextmanager
    def opened(self, flat: Tensor, name: str) -> Iterator[Tensor]:
        """Give a moment as a flat fp32 tensor to change in place; what it holds at the end is kept."""
        state, number = self._adamw.state[flat], _NUMBER[name]
        stored = state[f"state{number}"].view(-1)
        if stored.dtype != torch.uint8:
            yield stored
            return
        values = self.read(flat, name, 0, flat.numel())
        yield values
        codes, scales = quantize(values, state[f"qmap{number}"])
        stored.copy_(codes)
        state[f"absmax{number}"].copy_(scales)

    def updates(self, flat: Tensor) -> int:
        """Return how many updates the bias correction of `flat` counts."""
        return int(self._adamw.state[flat]["step"])

    def set_updates(self, flat: Tensor, updates: int) -> None:
        """Let the bias correction of `flat` count from `updates`."""
        self._adamw.state[flat]["step"] = updates


def dequantize(codes_N: Tensor, scales_K: Tensor, fractions: Tensor) -> Tensor:
    """Return `fractions[codes]` times each block's scale, fp32 [N]: what bitsandbytes' update itself starts from."""
    return dequantize_blockwise(codes_N, absmax=scales_K, code=fractions, blocksize=BLOCK)


def quantize(values_N: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [N], scales fp32 [K]) of fp32 `values`: of each the nearest of the sorted `fractions` [256].

    The scales are such that a block's largest magnitude is kept exactly. So values that came from `dequantize` come
    back bit for bit, and a resumed run is the run that was not stopped. bitsandbytes' own function scales by the
    largest magnitude itself: the signed fractions end at 1 but begin at -0.993, so where that element is negative,
    which is in half of the blocks, every element would move.
    """
    codes = torch.empty(values_N.shape, dtype=torch.uint8, device=values_N.device)
    scales = torch.empty(-(-values_N.numel() // BLOCK), dtype=torch.float32, device=values_N.device)
    boundaries = (fractions[1:] + fractions[:-1]) / 2
    for first in range(0, scales.numel(), _BLOCKS_AT_ONCE):
        elements = slice(first * BLOCK, (first + _BLOCKS_AT_ONCE) * BLOCK)
        part = values_N[elements]
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        scales_of_part, codes_of_part = _scale(blocks, fractions, boundaries)
        scales[first : first + _BLOCKS_AT_ONCE] = scales_of_part
        codes[elements] = codes_of_part.view(-1)[: part.numel()]
    return codes, scales


def _scale(blocks: Tensor, fractions: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales [K] and codes [K, 256] of fp32 blocks [K, 256].

    Dividing by the lowest fraction may miss the scale that was multiplied with it by one unit in the last place: of the
    neighbours, take the one that gives most of the elements exactly.
    """
    scales = blocks.amax(1)
    if fractions[0] < 0:
        lowest = -blocks.amin(1)
        scales = torch.where(lowest >= scales, lowest / -fractions[0], scales)
    best_scales, best_codes, best_count = scales, torch.zeros_like(blocks, dtype=torch.uint8), -torch.ones_like(scales)
    for limit in (None, 0.0, torch.inf):
        candidates = scales if limit is None else torch.nextafter(scales, torch.full_like(scales, limit))
        divisors = candidates.clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(blocks / divisors[:, None], boundaries, out_int32=True)
        count = (fractions[codes] * candidates[:, None] == blocks).sum(1)
        is_better = count > best_count
        best_scales = torch.where(is_better, candidates, best_scales)
        best_codes = torch.where(is_better[:, None], codes.to(torch.uint8), best_codes)
        best_count = torch.where(is_better, count, best_count)
    return best_scales, best_codes
