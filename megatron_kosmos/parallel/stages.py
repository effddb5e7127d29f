"""Which decoder layers each piece of the pipeline holds, balanced by counted cost.

The first chunk also holds the embedding and the vision side, the last one the vocabulary projection and the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """A contiguous run of decoder layers that one pipeline stage holds."""

    index: int
    """Place in model order, 0 ≤ index < pipeline x virtual."""
    virtual_index: int
    """Place among the chunks of its stage."""
    first_layer: int
    num_layers: int
    is_first: bool
    """Holds embedding, vision tower and resampler."""
    is_last: bool
    """Holds the final LayerNorm, the output projection and the loss."""


def balance_layers(
    num_layers: int, pp_size: int, virtual_size: int, first_cost: float, last_cost: float
) -> tuple[int, ...]:
    """Cut `num_layers` into `pp_size` x `virtual_size` chunks of at least one layer, listed in model order.

    The dearest stage is as cheap as it can be, and in each stage its dearest chunk is. Costs are in layers:
    `first_cost` comes on top of the first chunk's layers, `last_cost` on top of the last one's. Among equals, earlier
    ones get the smaller share, since the first stages hold the most activations in flight.
    """
    loads = [1.0] * (pp_size * virtual_size)
    loads[0] += first_cost
    loads[-1] += last_cost
    layers = [1] * len(loads)
    for _ in range(num_layers - len(loads)):
        # Greedy is optimal here: parts are equal but for a constant, and the maximum grows by single layers.
        stage = min(range(pp_size), key=lambda rank: (sum(loads[rank::pp_size]), -rank))
        chunk = min(range(stage, len(loads), pp_size), key=lambda index: (loads[index], -index))
        loads[chunk] += 1
        layers[chunk] += 1
    return tuple(layers)


def chunks_of_stage(chunk_layers: Sequence[int], pp_rank: int, pp_size: int) -> tuple[Chunk, ...]:
    """Return what stage `pp_rank` holds when `chunk_layers` lists every chunk's layers in model order."""
    chunks = []
    for index in range(pp_rank, len(chunk_layers), pp_size):
        chunks.append(
            Chunk(
                index=index,
                virtual_index=index // pp_size,
                first_layer=sum(chunk_layers[:index]),
                num_layers=chunk_layers[index],
                is_first=index == 0,
                is_last=index == len(chunk_layers) - 1,
            )
        )
    return tuple(chunks)
