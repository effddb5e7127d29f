"""The tokens of one call of generation: where they stand, what they see, and the keys and values kept of earlier calls.

Shape letters: T tokens of this call, C tokens cached and of this call, B rows, G this rank's query groups, K head size.
"""

from dataclasses import dataclass
from typing import Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class KeyValueCache(Protocol):
    """What is asked of a cache, such as transformers' `DynamicCache`. It is a tensor rank's own, of its own heads."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, T, K] of a layer, counted from 0, and return all of them, [B, G, C, K]."""
        ...


@dataclass(kw_only=True)
class CachedTokens(PackedSeqParams):
    """What attention must know of a call's tokens; megatron-core hands it from the block to each layer's attention.

    Its own inference contexts keep keys before they are rotated, know no left padding and no beams that change places.
    """

    position_ids: Tensor
    """[B, T] int64. Positions within the row, counted from its first token that is no padding."""
    is_visible: Tensor | None = None
    """[B, 1, T, C] bool. Which tokens each one attends to; None: those up to itself, or with T = 1 all."""
    cache: KeyValueCache | None = None
    """None keeps nothing: the call's tokens are whole rows."""
