"""The learning rate as a pure function of the step."""

import math

from megatron_kosmos.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, 0 ≤ step < `num_steps`.

    Rises linearly over `warmup_steps` steps to `learning_rate`, then goes to `min_learning_rate`, which it would
    reach at step `num_steps`.
    """
    peak, floor = optimizer.learning_rate, optimizer.min_learning_rate
    if step < optimizer.warmup_steps:
        return peak * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, num_steps - optimizer.warmup_steps)
    match optimizer.decay:
        case "constant":
            return peak
        case "linear":
            return peak + (floor - peak) * progress
        case "cosine":
            return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
