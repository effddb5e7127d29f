"""The Magneto decoder (arXiv 2210.06423) as a layer spec of megatron-core.

What differs from megatron-core's own decoder: the output projections normalize their input (sub-LN), the core attention
applies xPos, and recomputation begins at the lowest trained weight (`recomputation.py`). Everything else, sequence
parallelism included, is megatron-core's.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_kosmos.config import DecoderConfig, ParallelConfig, TrainingConfig
from megatron_kosmos.model.attention import CausalAttention
from megatron_kosmos.model.dropout import get_bias_dropout_add
from megatron_kosmos.model.kernels import Kernels
from megatron_kosmos.model.layer_norm import ResidualLayerNorm
from megatron_kosmos.model.magneto_config import MagnetoConfig
from megatron_kosmos.model.sub_layer_norm import SubLNRowParallelLinear
from megatron_kosmos.model.xpos import XPos


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm of queries or keys over the head (arXiv 2302.05442, section 2), alike for every head of a layer.

    Each tensor rank normalizes the heads that it attends with, over all tokens. Where ranks share a key head, each
    gets the part of its gradient that comes from its own queries. So the gradient is in every case the plain sum over
    the tensor ranks, under sequence parallelism too.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sees_head_shard = True  # type: ignore[attr-defined]


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel projection that adds its bias itself (a bias handed on would be gone under ZeRO 3)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["skip_bias_add"] = False
        super().__init__(*args, **kwargs)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor, **kwargs: Any) -> Tensor:
        """Return the product and the bias. megatron-core's product with a frozen weight gives its bias no gradient."""
        if weight.requires_grad:
            output: Tensor = super()._forward_impl(input, weight, *args, bias=bias, **kwargs)
            return output
        product: Tensor = super()._forward_impl(input, weight, *args, bias=None, **kwargs)
        return product + bias


def transformer_config(
    decoder: DecoderConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    chunk_layers: tuple[int, ...],
    kernels: Kernels,
) -> MagnetoConfig:
    """Derive megatron-core's configuration. `chunk_layers` lists the decoder layers of every chunk in model order."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[training.precision]
    is_interleaved = parallel.virtual_pipeline_parallel_size > 1
    recompute: dict[str, Any] = {}
    if training.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return MagnetoConfig(
        kernels=kernels,
        num_layers=decoder.num_layers,
        hidden_size=decoder.width,
        ffn_hidden_size=decoder.ffn_width,
        num_attention_heads=decoder.num_heads,
        num_query_groups=decoder.num_query_groups,
        layernorm_epsilon=decoder.layer_norm_epsilon,
        hidden_dropout=decoder.dropout,
        attention_dropout=decoder.attention_dropout,
        activation_func=F.gelu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.precision == "bf16",
        # Weights are made on the host from their names (initialization.py), so megatron-core only allocates them.
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_parallel_size if is_interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(chunk_layers) if parallel.pipeline_parallel_size > 1 else None,
        # Interleaving with batched p2p between two stages swaps tensors silently; on gloo, freed outputs crash it.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=parallel.batch_p2p,
        deallocate_pipeline_outputs=not is_interleaved,
        bias_dropout_fusion=False,  # compiled by torch at start, and never run here; a GPU test has to come first
        bias_activation_fusion=False,
        masked_softmax_fusion=kernels.softmax == "apex",
        gradient_accumulation_fusion=kernels.gradient_accumulation == "apex",
        persist_layer_norm=kernels.layer_norm == "apex",
        **recompute,
    )


def decoder_submodules(decoder: DecoderConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Return the spec of a chunk of `num_layers` Magneto layers. All its layers share one table of positions."""
    xpos = XPos(decoder.head_size, decoder.max_sequence_length) if decoder.xpos else None
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ResidualLayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=BiasedColumnParallelLinear,
                    core_attention=partial(CausalAttention, xpos=xpos),
                    linear_proj=SubLNRowParallelLinear,
                    q_layernorm=HeadLayerNorm if decoder.query_key_norm else None,
                    k_layernorm=HeadLayerNorm if decoder.query_key_norm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ResidualLayerNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=BiasedColumnParallelLinear, linear_fc2=SubLNRowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=ResidualLayerNorm)


def _pipeline_layout(chunk_layers: tuple[int, ...]) -> list[list[str]]:
    """Write the chunks the way megatron-core's `pipeline_model_parallel_layout` wants them."""
    layout = [["decoder"] * count for count in chunk_layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
