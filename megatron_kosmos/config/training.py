"""How the network is trained: steps, batch, precision, optimizer, schedule."""

from fnmatch import fnmatchcase
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


class ParameterGroupConfig(StrictModel):
    """What is special about the parameters with certain names."""

    parameters: tuple[str, ...]
    """Patterns over global names, such as `vision_tower.encoder.layers.23.*`; `*` stands for any characters."""
    frozen: bool = False
    """Keep the weights as they are. Below the lowest trained weight nothing is kept for a backward pass."""
    learning_rate_scale: PositiveFloat = 1.0
    """Factor on the learning rate of every step."""
    weight_decay: NonNegativeFloat | None = None
    """In place of `optimizer.weight_decay`, on the same kinds of weights; null keeps that."""

    def matches(self, name: str) -> bool:
        """Whether the parameter `name` belongs here."""
        return any(fnmatchcase(name, pattern) for pattern in self.parameters)


class OptimizerConfig(StrictModel):
    """AdamW, its schedule, and what of the model it trains."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps moments in 8 bits, blockwise (bitsandbytes, arXiv 2110.02861); those of embeddings in 32."""
    groups: tuple[ParameterGroupConfig, ...] = ()
    """Freezing, learning rate and weight decay by name. The first group that matches a name counts; parameters that
    none matches are trained with the settings here."""
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

    def group_of(self, name: str) -> int | None:
        """Return the number of the group that the parameter `name` belongs to, None where none matches."""
        return next((number for number, group in enumerate(self.groups) if group.matches(name)), None)

    def freezes(self, name: str) -> bool:
        """Whether the parameter `name` is not trained."""
        group = self.group_of(name)
        return group is not None and self.groups[group].frozen

    @model_validator(mode="after")
    def _groups_have_patterns(self) -> Self:
        for number, group in enumerate(self.groups):
            if not group.parameters:
                raise ValueError(f"groups.{number}.parameters is empty; name at least one pattern")
        return self

    @model_validator(mode="after")
    def _ends_below_start(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} exceeds learning_rate={self.learning_rate}")
        return self
