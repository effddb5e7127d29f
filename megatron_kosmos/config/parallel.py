"""How the ranks are cut: tensor x pipeline x data."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel


class ParallelConfig(StrictModel):
    """How the ranks are cut. tensor * pipeline * data = world size."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share every layer. Keep it within one node."""
    sequence_parallel: bool = False
    """Shard activations between the tensor-parallel regions along the sequence (arXiv 2205.05198)."""
    pipeline_parallel_size: PositiveInt = 1
    """Pipeline stages. Stage 0 also holds the vision tower and the resampler."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Chunks of layers a stage holds; above 1 the schedule is interleaved (arXiv 2104.04473)."""
    chunk_layers: tuple[int, ...] | None = None
    """Decoder layers of each chunk in model order, pipeline * virtual numbers; null balances counted cost."""
    batch_p2p: bool = False
    """Post a step's sends and receives as one batch."""
    context_parallel_size: PositiveInt = 1
    """Not supported: only 1 is legal."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO over the data-parallel ranks: 1 shards optimizer state, 2 gradients too, 3 weights too."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_chunks(self) -> int:
        """Pieces that the decoder is cut into."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size

    @model_validator(mode="after")
    def _combination_is_legal(self) -> Self:
        if self.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size={self.context_parallel_size} is not supported; use 1")
        if self.zero_stage > 1 and self.pipeline_parallel_size > 1:
            raise ValueError(
                f"zero_stage={self.zero_stage} frees gradients that the pipeline schedule still adds to; "
                f"with pipeline_parallel_size={self.pipeline_parallel_size} use zero_stage 0 or 1"
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel=true needs tensor_parallel_size > 1")
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} needs pipeline_parallel_size > 1"
            )
        if self.virtual_pipeline_parallel_size > 1 and self.batch_p2p:
            raise ValueError(
                "batch_p2p=true with virtual_pipeline_parallel_size > 1 trains on wrong activations when two stages "
                "exchange in both directions; use batch_p2p=false"
            )
        return self
