"""Names of parameters that don't depend on the layout, and where tensor parallelism cuts them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from megatron_kosmos.model.kosmos import KosmosModel

TIED_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of this rank under its global name."""

    name: str
    parameter: nn.Parameter
    shard_dim: int | None
    """Dimension that tensor parallelism cuts; None when every tensor rank holds the same."""
    is_tied_copy: bool
    """Whether this is the last stage's copy of the tied embedding, whose name it bears."""


def named_parameters(model: KosmosModel) -> Iterator[NamedParameter]:
    """Yield every parameter of a chunk with its global name: layers are counted over the whole model."""
    for local_name, parameter in model.named_parameters():
        name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + model.chunk.first_layer}.", local_name)
        is_tied_copy = bool(getattr(parameter, "is_tied_copy", False))
        if is_tied_copy:
            assert name == _OUTPUT, name
            name = TIED_EMBEDDING
        is_sharded = bool(getattr(parameter, "tensor_model_parallel", False))
        yield NamedParameter(name, parameter, parameter.partition_dim if is_sharded else None, is_tied_copy)
