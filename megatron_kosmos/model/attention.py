"""Causal self-attention inside megatron-core's layer: xPos, then the kernel that the run has chosen.

Shape letters: T tokens, B batch, H this rank's heads, G its query groups, K head size, N = B * T,
C tokens cached and of this call.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from megatron_kosmos.model.blocked_attention import causal_attention_with_dropout
from megatron_kosmos.model.cached_tokens import CachedTokens
from megatron_kosmos.model.documents import Segments, attend_within
from megatron_kosmos.model.magneto_config import MagnetoConfig
from megatron_kosmos.model.xpos import XPos


class CausalAttention(nn.Module):
    """Core attention of one decoder layer, from split heads to joined heads."""

    def __init__(self, config: MagnetoConfig, xpos: XPos | None, layer_number: int = 1, **layer: Any) -> None:
        """`layer_number`, from 1, and `layer` are what megatron-core's SelfAttention tells its core attention."""
        super().__init__()
        self.xpos, self.layer_index = xpos, layer_number - 1
        self.kernel = _KERNELS[config.kernels.attention](config, layer_number=layer_number, **layer)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Segments | CachedTokens | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend. query [T, B, H, K], key and value [T, B, G, K]; returns [T, B, H * K].

        `attention_mask` is megatron-core's and not used: attention is causal over the whole sequence, or within each of
        the segments that megatron-core hands on as `packed_seq_params`. xPos need not start anew with a segment, since
        scores depend on distances alone. In generation megatron-core hands on `CachedTokens` instead.
        """
        if isinstance(packed_seq_params, CachedTokens):
            return self._attend_cached(query, key, value, packed_seq_params)
        if self.xpos is not None:
            query, key = self.xpos(query, key)
        context: Tensor = self.kernel(query, key, value, packed_seq_params)
        return context

    def _attend_cached(self, query: Tensor, key: Tensor, value: Tensor, tokens: CachedTokens) -> Tensor:
        """Attend to the cached tokens and this call's, by torch's kernel; keys are kept rotated (decision 9)."""
        if self.xpos is not None:
            query, key = self.xpos(query, key, tokens.position_ids)
        q_BHTK, k_BGTK, v_BGTK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if tokens.cache is not None:
            k_BGTK, v_BGTK = tokens.cache.update(k_BGTK, v_BGTK, self.layer_index)
        is_causal = tokens.is_visible is None and len(query) > 1
        return _attend_heads(q_BHTK, k_BGTK, v_BGTK, attn_mask=tokens.is_visible, is_causal=is_causal)


class SdpaAttention(nn.Module):
    """torch's scaled-dot-product attention, on any device; documents one after the other.

    With dropout on the CPU, where torch has no flash kernel for it, attention goes in blocks.
    """

    def __init__(self, config: MagnetoConfig, **_: Any) -> None:
        super().__init__()
        self.config, self.dropout = config, config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
        """As `CausalAttention.forward`, after xPos."""
        with _stream_of_heads(self.config):
            if segments is None:
                return self._attend(query, key, value)
            return attend_within(segments, self._attend, query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [T, B, H * K], causal over the T tokens."""
        q_BHTK, k_BGTK, v_BGTK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if dropout and not query.is_cuda:
            return _joined(causal_attention_with_dropout(q_BHTK, k_BGTK, v_BGTK, dropout))
        return _attend_heads(q_BHTK, k_BGTK, v_BGTK, dropout_p=dropout, is_causal=True)


class FlashAttention(nn.Module):
    """flash-attn (arXiv 2307.08691), on CUDA in bf16; documents all at once, by their borders."""

    def __init__(self, config: MagnetoConfig, **_: Any) -> None:
        super().__init__()
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        self.config, self.dropout = config, config.attention_dropout
        self._attend, self._attend_within = flash_attn_func, flash_attn_varlen_func

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
        """As `CausalAttention.forward`, after xPos. Scores are scaled by K ** -0.5, flash-attn's default."""
        length, batch = query.shape[:2]
        heads = [x.transpose(0, 1) for x in (query, key, value)]
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0, "causal": True}
        with _stream_of_heads(self.config):
            if segments is None:
                context = self._attend(*heads, **options)
            else:
                context = self._attend_within(
                    *(x.flatten(0, 1) for x in heads),
                    cu_seqlens_q=segments.cu_seqlens_q,
                    cu_seqlens_k=segments.cu_seqlens_kv,
                    max_seqlen_q=segments.max_seqlen_q,
                    max_seqlen_k=segments.max_seqlen_kv,
                    **options,
                )
        return context.reshape(batch, length, -1).transpose(0, 1).contiguous()


class UnfusedAttention(DotProductAttention):
    """megatron-core's matrix products and softmax, in which apex's softmax has its place. Holds [B, H, T, T].

    It draws dropout from the stream of the heads by itself.
    """

    def __init__(self, config: MagnetoConfig, **layer: Any) -> None:
        """Hide the softmax and the dropout from whom walks over modules.

        They run once for each document, so how often differs between data ranks, and ZeRO 3, which counts calls of
        modules to fetch weights ahead, would wait for ever.
        """
        super().__init__(config, **layer)
        for name in ("scale_mask_softmax", "attention_dropout"):
            self.__dict__[name] = self._modules.pop(name)

    def train(self, mode: bool = True) -> "UnfusedAttention":
        """Switch dropout on or off."""
        self.attention_dropout.train(mode)
        return super().train(mode)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | None) -> Tensor:
        """As `CausalAttention.forward`, after xPos; documents one after the other."""
        if segments is None:
            return self._attend(query, key, value)
        return attend_within(segments, self._attend, query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context: Tensor = super().forward(query, key, value, attention_mask=None)
        return context


_KERNELS: dict[str, type[nn.Module]] = {"sdpa": SdpaAttention, "flash": FlashAttention, "unfused": UnfusedAttention}


def _attend_heads(q_BHTK: Tensor, k_BGCK: Tensor, v_BGCK: Tensor, **options: Any) -> Tensor:
    """Return [T, B, H * K] of torch's scaled-dot-product attention with its `options`."""
    is_grouped = q_BHTK.shape[1] != k_BGCK.shape[1]
    context_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGCK, v_BGCK, enable_gqa=is_grouped, **options)
    return _joined(context_BHTK)


def _joined(context_BHTK: Tensor) -> Tensor:
    return context_BHTK.permute(2, 0, 1, 3).flatten(2)


def _stream_of_heads(config: MagnetoConfig) -> AbstractContextManager[None]:
    """Draw dropout from the stream that differs between tensor ranks, for heads are shared out over them.

    Under sequence parallelism megatron-core's block has entered that stream already.
    """
    stream: AbstractContextManager[None] = nullcontext() if config.sequence_parallel else get_cuda_rng_tracker().fork()
    return stream
