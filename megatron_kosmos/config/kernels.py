"""Which implementation computes what: plain torch everywhere, faster kernels where they are installed (decision 7)."""

from typing import Literal

from megatron_kosmos.config.base import StrictModel


class KernelsConfig(StrictModel):
    """`auto` takes the fastest that is there; one that is named but absent is an error that says how to install it."""

    attention: Literal["auto", "sdpa", "flash", "unfused"] = "auto"
    """flash: flash-attn, on CUDA in bf16. sdpa: torch's scaled-dot-product attention. unfused: megatron-core's
    matrix products and softmax, which hold a T x T matrix for each head."""
    layer_norm: Literal["auto", "torch", "apex", "te"] = "auto"
    """Of the residual stream. apex and te (TransformerEngine) need CUDA."""
    softmax: Literal["auto", "torch", "apex"] = "auto"
    """Of unfused attention: apex's scale, mask and softmax in one kernel, on CUDA in bf16."""
    gradient_accumulation: Literal["auto", "torch", "apex"] = "auto"
    """apex adds weight gradients to their fp32 sums inside the matrix product: on CUDA, in bf16, at ZeRO 1."""
