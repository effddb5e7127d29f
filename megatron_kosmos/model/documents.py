"""The segments of tokens that attention stays within when documents are masked, and attention over each alone.

Shape letters: T tokens, B batch, H heads, K head size, N segments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From query [T, B, H, K], key and value to [T, B, H * K], causal over all T tokens."""


@dataclass
class Segments(PackedSeqParams):
    """Where attention's segments lie in the rows laid end to end.

    megatron-core hands it from the block to each layer's core attention, under recompute too. Its own packed format is
    one long row ("thd"); ours stays [T, B, ...], so that sequence parallelism and sub-LN see nothing of documents.
    """

    lengths: tuple[int, ...] = ()
    """Tokens of each of the N segments."""


def segments_of(batch: MultimodalBatch, device: torch.device) -> Segments | None:
    """Return the batch's segments with their borders on `device`, None where every row is one segment."""
    if not batch.masks_documents:
        return None
    starts = batch.document_starts.to(device, non_blocking=True)
    lengths = tuple(batch.document_starts.diff().tolist())
    longest = max(lengths)
    return Segments(
        qkv_format="sbhd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
    )


def attend_within(segments: Segments, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return [T, B, H * K], each segment attended alone: query [T, B, H, K], key and value with their own heads.

    Costs the squares of the segments' lengths in place of the row's, and holds no mask.
    """
    length, batch = query.shape[:2]
    # One split of each tensor: as many slices would each allocate a whole gradient in the backward pass.
    parts = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1).split(segments.lengths) for x in (query, key, value))
    contexts = [attend(*segment) for segment in zip(*parts, strict=True)]
    return torch.cat(contexts).view(batch, length, -1).transpose(0, 1).contiguous()
