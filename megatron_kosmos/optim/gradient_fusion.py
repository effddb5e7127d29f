"""Weight gradients that kernels add to DeepSpeed's fp32 sums, without a bf16 gradient in between.

Under `gradient_accumulation_fusion` megatron-core's linear layers hand apex's kernel `weight.main_grad`, into which it
adds, and return no gradient to autograd. So `main_grad` must be the sum that DeepSpeed reduces, clips and steps with,
and DeepSpeed, whose hooks see no gradient, must be told that there is one.
"""

from collections.abc import Iterable

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn


def accumulate_inside_kernels(chunks: Iterable[nn.Module], optimizer: object) -> None:
    """Give the weights of `chunks` DeepSpeed's sums as `main_grad`, if their layers want it; else do nothing.

    Every trained weight gets one. The matrices of the vocabulary need none: their gradients come by autograd, the
    loss's own (`model/loss.py`) and the lookup's. A weight whose sum stays zero counts as zero in the norm. Raises
    TypeError for an optimizer other than DeepSpeed's BF16_Optimizer, which alone keeps whole fp32 sums.
    """
    if not any(
        getattr(module, "gradient_accumulation_fusion", False) for chunk in chunks for module in chunk.modules()
    ):
        return
    if not isinstance(optimizer, BF16_Optimizer):
        raise TypeError(f"gradient accumulation inside kernels needs BF16_Optimizer, not {type(optimizer).__name__}")
    for weights, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for weight, flat in zip(weights, sums, strict=True):
            weight.main_grad = flat.view_as(weight)
            weight._hp_grad = flat
    clear = optimizer.clear_hp_grads

    def clear_and_expect() -> None:
        clear()
        optimizer.fp32_groups_has_gradients = [[True] * len(sums) for sums in optimizer.fp32_groups_gradients]

    optimizer.clear_hp_grads = clear_and_expect
    clear_and_expect()
