"""The torch optimizer that DeepSpeed's ZeRO wraps, and where it keeps its moments."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_kosmos.config import OptimizerConfig
from megatron_kosmos.optim.installed import check_installed

MOMENTS = ("exp_avg", "exp_avg_sq")


class Moments(Protocol):
    """Access to the moments of an AdamW. A `flat` is a tensor that AdamW itself updates; its shape doesn't matter."""

    def create(self, flat: Tensor, group: dict[str, Any]) -> None:
        """Make zero moments for `flat`, which has the settings of torch's `group`."""

    def read(self, flat: Tensor, name: str, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of the moment called `name` in fp32, not to be changed."""

    def opened(self, flat: Tensor, name: str) -> AbstractContextManager[Tensor]:
        """Give the moment called `name` as a flat fp32 tensor to change in place; what it holds at the end is kept."""

    def updates(self, flat: Tensor) -> int:
        """Return how many updates the bias correction of `flat` counts."""

    def set_updates(self, flat: Tensor, updates: int) -> None:
        """Let the bias correction of `flat` count from `updates`."""


class TorchMoments:
    """The moments of torch's own AdamW: fp32 tensors under their names."""

    def __init__(self, adamw: torch.optim.Optimizer) -> None:
        """Look after the moments of `adamw`."""
        self._state = adamw.state

    def create(self, flat: Tensor, group: dict[str, Any]) -> None:
        """Make zero moments for `flat`."""
        moments = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
        self._state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}

    def read(self, flat: Tensor, name: str, start: int, length: int) -> Tensor:
        """Return a view of the moment."""
        return self._state[flat][name].view(-1)[start : start + length]

    @contextmanager
    def opened(self, flat: Tensor, name: str) -> Iterator[Tensor]:
        """Give the moment itself."""
        yield self._state[flat][name].view(-1)

    def updates(self, flat: Tensor) -> int:
        """Return torch's count."""
        return round(float(self._state[flat]["step"]))

    def set_updates(self, flat: Tensor, updates: int) -> None:
        """Set torch's count."""
        self._state[flat]["step"].fill_(updates)


def build_adamw(groups: Sequence[dict[str, Any]], optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over `groups` (`groups.parameter_groups`), whose weight decay is already their own.

    Raises ConfigError where the library of `optimizer.kind` is missing.
    """
    settings: dict[str, Any] = {"lr": optimizer.learning_rate, "betas": optimizer.betas, "eps": optimizer.epsilon}
    if optimizer.kind == "adamw":
        return torch.optim.AdamW(list(groups), **settings, fused=True)
    check_installed(optimizer)
    from megatron_kosmos.optim.eight_bit import AdamW8bit  # bitsandbytes is an extra

    return AdamW8bit(list(groups), **settings)


def moments_of(adamw: torch.optim.Optimizer) -> Moments:
    """Return access to the moments of what `build_adamw` returned."""
    if isinstance(adamw, torch.optim.AdamW):
        return TorchMoments(adamw)
    from megatron_kosmos.optim.eight_bit import AdamW8bit, EightBitMoments

    assert isinstance(adamw, AdamW8bit), type(adamw)
    return EightBitMoments(adamw)
