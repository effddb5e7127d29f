"""How the network is trained: steps, batch, precision, optimizer, schedule."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainingConfig(StrictModel):
    """Length, batch and numerics of the run."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    micro_batch_size: PositiveInt
    """Sequences that go through the model at once on one data-parallel rank."""
    global_batch_size: PositiveInt
    """Sequences of one optimizer step over all data-parallel ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Initialization, dropout and data order derive from it."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 masters, fp32 moments and fp32 gradient sums."""
    recompute: Literal["none", "full"] = "none"
    """full stores only each layer's input and computes the layer again in the backward pass."""


class OptimizerConfig(StrictModel):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the way from `learning_rate` after warm-up to `min_learning_rate` at the last step."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    epsilon: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.01
    """Applies to matrices; biases, norms, embeddings of positions and latents have none."""
    clip_grad_norm: NonNegativeFloat = 2.0
    """Largest global gradient norm; 0 does not clip."""

    @model_validator(mode="after")
    def _ends_below_start(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} exceeds learning_rate={self.learning_rate}")
        return self
