"""The part of the model that one rank trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_kosmos.engine.trainable import Weight
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import NamedParameter, named_parameters
from megatron_kosmos.optim.zero import ZeroOptimizer


@dataclass(frozen=True)
class Stage:
    """This rank's chunks of the model, and their optimizer."""

    chunks: tuple[KosmosModel, ...]
    optimizer: ZeroOptimizer
    weights: tuple[Weight, ...]
    """What the whole model holds, over all stages."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """JSON of the checkpoint that it goes on from; empty from the start."""

    @property
    def named(self) -> list[NamedParameter]:
        """Every parameter of this rank under its global name, the tied copy included."""
        return [named for chunk in self.chunks for named in named_parameters(chunk)]
