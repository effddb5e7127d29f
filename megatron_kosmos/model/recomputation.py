"""The stack of decoder layers whose activations are recomputed from the lowest trained weight on.

Shape letters: T tokens, B batch, D decoder width.
"""

from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn


class DecoderBlock(TransformerBlock):
    """megatron-core's stack of layers, with its recomputation put right where weights are frozen.

    That is reentrant: a layer whose input needs no gradient gets no graph, and its trained weights no gradients. Making
    the stack's input need one would carry the backward pass, and the recomputation, down through frozen layers. So here
    the input of the lowest layer that trains is made to need one, and the layers below it run once, without a graph.
    """

    def _checkpointed_forward(
        self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None, **_: Any
    ) -> Tensor:
        """Return [T, B, D] of the last layer; of a layer above the lowest trained weight only the input is kept."""
        hidden_TBD = hidden_states
        for layer in self.layers:
            run = partial(_run, layer, packed_seq_params)
            if not hidden_TBD.requires_grad and not any(parameter.requires_grad for parameter in layer.parameters()):
                hidden_TBD = run(hidden_TBD)
            else:
                hidden_TBD = tensor_parallel.checkpoint(run, False, hidden_TBD.requires_grad_())
        return hidden_TBD


def _run(layer: nn.Module, packed_seq_params: PackedSeqParams | None, hidden_TBD: Tensor) -> Tensor:
    output: Tensor = layer(hidden_states=hidden_TBD, attention_mask=None, packed_seq_params=packed_seq_params)[0]
    return output
