"""Causal self-attention inside megatron-core's layer: xPos, then torch's scaled-dot-product kernels.

Shape letters: T tokens, B batch, H this rank's heads, G its query groups, K head size.
"""

from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_kosmos.model.documents import Stretches, attend_within
from megatron_kosmos.model.xpos import XPos


class CausalAttention(nn.Module):
    """Core attention of one decoder layer, from split heads to joined heads."""

    def __init__(self, config: TransformerConfig, xpos: XPos | None, **_: Any) -> None:
        super().__init__()
        self.config = config
        self.xpos = xpos
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Stretches | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend. query [T, B, H, K], key and value [T, B, G, K]; returns [T, B, H * K].

        `attention_mask` is megatron-core's and not used: attention is causal over the whole sequence, or within each of
        the stretches that megatron-core hands on as `packed_seq_params`. xPos need not start anew with a stretch, since
        scores depend on distances alone.
        """
        if self.xpos is not None:
            query, key = self.xpos(query, key)
        # Heads are shared out over the tensor ranks, so their masks must differ between ranks. Under sequence
        # parallelism megatron-core's block has entered the sharded stream already.
        sharded_stream = nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        with sharded_stream:
            if packed_seq_params is None:
                return self._attend(query, key, value)
            return attend_within(packed_seq_params, self._attend, query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [T, B, H * K], causal over the T tokens."""
        length, batch = query.shape[:2]
        q_BHTK, k_BGTK, v_BGTK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGTK,
            v_BGTK,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1],
        )
        return context_BHTK.permute(2, 0, 1, 3).reshape(length, batch, -1)
