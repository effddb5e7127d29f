"""Cross-entropy over a vocabulary that tensor parallelism has cut and that has padding behind its last id.

Shape letters: B batch, T tokens, V this rank's share of the padded vocabulary.
"""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def mask_padded_vocabulary(logits_TBV: Tensor, vocab_size: int, tp_rank: int) -> Tensor:
    """Return the logits with the lowest finite value in the columns of ids that do not exist (≥ `vocab_size`)."""
    share = logits_TBV.shape[-1]
    num_real = min(max(vocab_size - tp_rank * share, 0), share)
    if num_real == share:
        return logits_TBV
    is_padding = torch.arange(share, device=logits_TBV.device) >= num_real
    return logits_TBV.masked_fill(is_padding, torch.finfo(logits_TBV.dtype).min)


def token_losses(logits_TBV: Tensor, labels_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Return each position's cross-entropy [B, T] in nats, zero where `loss_mask_BT` is false.

    fp32, arithmetic and result; logits in fp32 are overwritten. Over the tensor-parallel group: all-reduces of the
    maximum, the target's logit and the sum of exponentials.
    """
    losses_TB = vocab_parallel_cross_entropy(logits_TBV, labels_BT.transpose(0, 1).contiguous())
    return losses_TB.transpose(0, 1) * loss_mask_BT
