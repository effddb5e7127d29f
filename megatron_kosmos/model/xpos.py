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

    def forward(self, query: Tensor, key: Tensor, position_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate query and key [T, B, H, K]. Dtypes are kept.

        They stand at `position_ids_BT`, below `max_length`; None: at positions 0 to T - 1 in every row.
        """
        return (
            _rotate(query, *(self._rows(name, query, position_ids_BT) for name in ("query_cos", "query_sin"))),
            _rotate(key, *(self._rows(name, key, position_ids_BT) for name in ("key_cos", "key_sin"))),
        )

    def _rows(self, table: str, x_TBHK: Tensor, position_ids_BT: Tensor | None) -> Tensor:
        """Return a table's rows [T, 1 or B, 1, K / 2] for the tokens of x."""
        rows = self.get_buffer(table)
        if position_ids_BT is None:
            return rows[: len(x_TBHK), None, None, :]
        return rows[position_ids_BT.T].unsqueeze(2)


def _rotate(x_TBHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of the last dimension by the angles of cos and sin [T, 1 or B, 1, K / 2]."""
    even, odd = x_TBHK[..., 0::2], x_TBHK[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x_TBHK.dtype)
