"""The torch optimizer that DeepSpeed's ZeRO wraps."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_kosmos.config import OptimizerConfig


def build_adamw(groups: Sequence[dict[str, Any]], optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over `groups` (`groups.parameter_groups`), whose weight decay is already their own."""
    return torch.optim.AdamW(
        list(groups), lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.epsilon, fused=True
    )
