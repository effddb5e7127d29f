"""DeepSpeed's ZeRO engine around the chunks of one rank, configured for megatron-core's schedule.

The schedule drives forward and backward; the engine takes the optimizer step, reducing over the data-parallel ranks.
At stages 0 and 1 the schedule runs the chunks themselves, then gradients are finalized. At stages 2 and 3 it runs the
engine (`module_to_run`), since DeepSpeed cuts gradients and weights from its own forward and backward hooks.
"""

import io
import logging
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors, is_model_parallel_parameter
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from megatron_kosmos.config import RunConfig
from megatron_kosmos.optim.adamw import build_adamw
from megatron_kosmos.optim.finalization import finalize_gradients, sum_gradients_while_they_arise, sum_tied_embedding
from megatron_kosmos.optim.gradient_fusion import accumulate_inside_kernels
from megatron_kosmos.optim.groups import (
    LEARNING_RATE_SCALE,
    add_placeholders,
    group_parameters,
    share_settings,
    torch_groups,
)
from megatron_kosmos.optim.mpu import ModelParallelUnit
from megatron_kosmos.optim.schedule import learning_rate
from megatron_kosmos.optim.state import OptimizerState
from megatron_kosmos.parallel.topology import Topology


class ZeroOptimizer:
    """The optimizer of one rank's chunks: `finalize()` makes gradients whole, `step()` schedules, clips and updates."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        names: dict[nn.Parameter, str],
        tied_weight: nn.Parameter | None,
        run: RunConfig,
        topology: Topology,
    ) -> None:
        """Wrap `chunks`, whose parameters have the global `names`.

        `tied_weight` is this rank's copy of a tied embedding that spans two stages, None elsewhere.
        """
        self.run, self.topology = run, topology
        self.tied_weight = tied_weight if tied_weight is not None and tied_weight.requires_grad else None
        self.stage = run.parallel.zero_stage
        groups = group_parameters(((name, parameter) for parameter, name in names.items()), run.optimizer)
        self.placeholders: list[nn.Parameter] = []
        if self.stage <= 1:  # elsewhere there is one pipeline stage, and DeepSpeed bears a rank without a norm
            share_settings(groups, topology.pp_group)
            # Alike on all tensor ranks, so that ZeRO cuts what they all hold in the same places; the last counts least.
            counts = [parameter for parameter in names if self._counts_in_norm(parameter, topology.tp_size - 1)]
            self.placeholders = add_placeholders(groups, counts, next(iter(names)))
        self.parameters = [*names, *self.placeholders]
        held = [*chunks, *([nn.ParameterList(self.placeholders)] if self.placeholders else [])]
        module = held[0] if len(held) == 1 else nn.ModuleList(held)
        if self.stage >= 2:
            sum_gradients_while_they_arise(self.parameters, topology)
        self.adamw = build_adamw(torch_groups(groups), run.optimizer)
        _quiet_deepspeed()
        with redirect_stdout(io.StringIO()):  # DeepSpeed's bf16 optimizer prints reports of its memory
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self.adamw,
                config=deepspeed_config(run, topology.dp_size),
                mpu=ModelParallelUnit(),
                dist_init_required=False,
            )
        accumulate_inside_kernels(chunks, self.optimizer)
        self.state = OptimizerState(self.adamw, self.optimizer, self.stage, topology)
        if self.stage == 0:
            self._keep_norm_of_plain_optimizer()
        elif self.stage >= 2 and topology.tp_size > 1:
            self._look_at_every_gradient()

    @property
    def module_to_run(self) -> nn.Module | None:
        """What the schedule must call in place of the chunk: the engine at ZeRO 2 and 3, else None."""
        return self.engine if self.stage >= 2 else None

    def gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the accumulated local gradient before any data-parallel reduction; stages 0 and 1."""
        if isinstance(self.optimizer, BF16_Optimizer):
            if not parameter.requires_grad:
                return None
            flat: Tensor = parameter._hp_grad  # type: ignore[attr-defined]
            return flat.view_as(parameter)
        return parameter.grad

    def finalize(self) -> None:
        """Make the gradients whole over tensor and pipeline ranks (at ZeRO 2 and 3 hooks did so already)."""
        if self.stage >= 2:
            return
        for placeholder in self.placeholders:
            placeholder.backward(torch.zeros_like(placeholder))
        finalize_gradients(self.parameters, self.gradient_of, self.topology)
        if self.run.model.decoder.tie_embeddings and self.topology.pp_size > 1:
            group = parallel_state.get_embedding_group(check_initialized=False)
            sum_tied_embedding(self.tied_weight, self.gradient_of, group)

    def step(self, step: int) -> tuple[float, float]:
        """Reduce, clip and update the weights; return (gradient norm before clipping, learning rate).

        The learning rate is the schedule's; a group's is that times its scale. If any gradient of any rank is not
        finite, nothing is changed and the norm is NaN, on every rank.
        """
        rate = learning_rate(self.run.optimizer, step, self.run.training.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group[LEARNING_RATE_SCALE]
        if self.stage <= 1:
            self._let_norm_see_all()
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.nan, rate

    def drop_gradients(self) -> None:
        """Forget the accumulated gradients: the step is skipped."""
        self.optimizer.zero_grad()

    def _counts_in_norm(self, parameter: nn.Parameter, tp_rank: int) -> bool:
        """Whether a tensor rank's part of a parameter is in the global norm: every element of the model is, once."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return tp_rank == 0 or bool(is_model_parallel_parameter(parameter))

    def _let_norm_see_all(self) -> None:
        """Make a gradient that is in the norm NaN where one of this rank that is not in it is not finite.

        The norm is all that tells the ranks of each other, and what tensor ranks hold alike is in it once.
        """
        counted: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in self.parameters:
            if (gradient := self.gradient_of(parameter)) is not None:
                (counted if self._counts_in_norm(parameter, self.topology.tp_rank) else others).append(gradient)
        if others:
            first = counted[0]
            first[(0,) * first.dim()] += 0.0 * torch.stack(torch._foreach_norm(others)).sum()  # 0, or NaN

    def _look_at_every_gradient(self) -> None:
        """Let DeepSpeed look for what is not finite in all gradients and not only in the norm, as it does for fp16."""
        if self.stage == 2:
            self.optimizer.check_grad_overflow = True
        else:
            self.optimizer._overflow_check_and_loss_scale_update = lambda update_scale: self.optimizer.check_overflow()

    def _keep_norm_of_plain_optimizer(self) -> None:
        """Without ZeRO, DeepSpeed 0.19.8 clips by a norm that leaves out what later pipeline stages replicate, and
        forgets it (`clip_fp32_gradients`): count each parameter once, keep the norm, update only if it is finite."""

        def clip_and_keep() -> None:
            counted = [
                parameter.grad
                for parameter in self.parameters
                if parameter.grad is not None and self._counts_in_norm(parameter, self.topology.tp_rank)
            ]
            norm = torch.as_tensor(get_global_norm_of_tensors(counted, mpu=self.engine.mpu))
            self.engine._global_grad_norm = torch.where(norm < 0, torch.nan, norm)  # -1: it is not finite
            if norm < 0:
                self.engine.zero_grad()  # AdamW passes over parameters without a gradient
            else:
                clip_grads_with_norm_(self.parameters, self.engine.gradient_clipping(), norm)

        self.engine.clip_fp32_gradients = clip_and_keep


def deepspeed_config(run: RunConfig, dp_size: int) -> dict[str, Any]:
    """Derive DeepSpeed's configuration. The schedule sums microbatches, so DeepSpeed sees one a step."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.training.micro_batch_size,
        "train_batch_size": run.training.micro_batch_size * dp_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {
            "stage": run.parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
        },
        "gradient_clipping": run.optimizer.clip_grad_norm or math.inf,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if run.training.precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _quiet_deepspeed() -> None:
    """Keep DeepSpeed from logging every setting, and on the CPU from trying out compilers and building a C++ op.

    DeepSpeed probes its ops when it is first asked for this dict, and builds its shared-memory op for 90 seconds where
    the probe succeeds; a build that was killed leaves a lock that hangs later runs.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(verbose=False)
