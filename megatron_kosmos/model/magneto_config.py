"""The configuration that modules of the decoder are built from: megatron-core's, and the kernels of the run."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kosmos.model.kernels import PLAIN, Kernels


@dataclass
class MagnetoConfig(TransformerConfig):
    """megatron-core's configuration, and the kernels that the modules built from it use."""

    kernels: Kernels = PLAIN
