"""xPos (arXiv 2212.10554): rotary positions whose length decays with distance, around one fixed centre.

Shape letters: T tokens, B batch, H heads, K head size.
"""

import torch
from torch import Tensor, nn

_SCALE_BASE = 512
_THETA = 10_000


class XPos(nn.Module):
    """Rotates and scales queries and keys by position.

    Queries are scaled by zeta ** ((p - c) / 512), keys by its inverse, with c = max_length // 2 for every length, so a
    score depends on the distance alone and keys may be cached once rotated (docs/decisions/0009). torchscale moves the
    centre with the length, which gives the same scores up to rounding.
    The tables are fp32 in every precision: at T = 2048 and K = 64 the scale reaches 17.
    """

    def __init__(self, head_size: int, max_length: int) -> None:
        super().__init__()
        even = torch.arange(0, head_size, 2, dtype=torch.float32)
        zeta = (even + 0.4 * head_size) / (1.4 * head_size)
        positions = torch.arange(max_length, dtype=torch.float32)[:, None]
        angle = positions * (1.0 / _THETA ** (torch.arange(head_size // 2) / (head_size // 2)))
        scale = zeta ** ((positions - max_length // 2) / _SCALE_BASE)
        for name, table in (
            ("query_cos", angle.cos() * scale),
            ("query_sin", angle.sin() * scale),
            ("key_cos", angle.cos() / scale),
            ("key_sin", angle.sin() / scale),
        ):
            self.register_buffer(name, table, persistent=False)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key [T, B, H, K] standing at positions 0 to T - 1. Dtypes are kept."""
        return (
            _rotate(query, self.get_buffer("query_cos"), self.get_buffer("query_sin")),
            _rotate(key, self.get_buffer("key_cos"), self.get_buffer("key_sin")),
        )


def _rotate(x_TBHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of the last dimension by their tables' angles."""
    length = x_TBHK.shape[0]
    cos, sin = cos[:length, None, None, :], sin[:length, None, None, :]
    even, odd = x_TBHK[..., 0::2], x_TBHK[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x_TBHK.dtype)
