"""A parameter's fp32 master and Adam moments, whole, wherever ZeRO has put their pieces.

Through DeepSpeed's public per-parameter accessors. Reading is a collective over the data-parallel ranks and gives each
of them the whole tensor: go parameter by parameter, and keep what is needed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """Access to what AdamW under ZeRO keeps for each trained parameter of this rank."""

    def __init__(self, adamw: torch.optim.AdamW, optimizer: Any, stage: int, dp_rank: int) -> None:
        """Create zero moments for `adamw`, wrapped by DeepSpeed's `optimizer` at ZeRO `stage`.

        DeepSpeed would make them at the first step; made here, a checkpoint can be read into them.
        """
        self.adamw, self.stage, self.dp_rank = adamw, stage, dp_rank
        self._flats = list(self._flat_partitions(optimizer))
        for flat in self._flats:
            moments = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
            adamw.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}
        if stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def updates(self) -> int:
        """Updates that AdamW has made, which its bias correction counts. Fewer than steps where steps were skipped."""
        return round(float(self.adamw.state[self._flats[0]]["step"])) if self._flats else 0

    def set_updates(self, updates: int) -> None:
        """Let AdamW count from `updates`."""
        for flat in self._flats:
            self.adamw.state[flat]["step"].fill_(updates)

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return {"master", "exp_avg", "exp_avg_sq"} of a trained parameter in fp32: this tensor rank's part of it."""
        if self.stage == 0:
            moments = self.adamw.state[parameter]
            return {MASTER: parameter.detach().float()} | {name: moments[name] for name in MOMENTS}
        whole = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        return {MASTER: safe_get_full_fp32_param(parameter)} | whole

    def frozen_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return an untrained parameter, which has neither master nor moments."""
        if self.stage < 3:
            return parameter.detach()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        """Set master and moments of a trained parameter; the weight that the model computes with is not touched."""
        if self.stage == 0:
            for name in MOMENTS:
                self.adamw.state[parameter][name].copy_(tensors[name])
        elif self.stage == 3:
            # DeepSpeed's accessor for whole tensors overruns one whose length the data ranks don't divide.
            safe_set_local_fp32_param(parameter, self._share(parameter, tensors[MASTER]))
            for name in MOMENTS:
                safe_set_local_optimizer_state(parameter, self._share(parameter, tensors[name]), name)
        else:
            safe_set_full_fp32_param(parameter, tensors[MASTER])
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[name], name)

    def _share(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return this data rank's part of a tensor that ZeRO 3 has cut, padded as DeepSpeed pads it."""
        length = parameter.ds_tensor.ds_numel
        start = self.dp_rank * length
        part = whole.flatten()[start : start + length]
        return torch.nn.functional.pad(part, (0, length - part.numel()))

    def _flat_partitions(self, optimizer: Any) -> Iterator[Tensor]:
        """Yield the tensors that AdamW itself updates."""
        if self.stage == 3:
            yield from optimizer.fp32_partitioned_groups_flat
        else:
            for group in self.adamw.param_groups:
                yield from group["params"]
