"""The root of a run's configuration: every setting of one training run, and the checks that cross sections."""

from pathlib import Path
from typing import Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.config.data import DataConfig
from megatron_kosmos.config.errors import ConfigError
from megatron_kosmos.config.health import HealthConfig
from megatron_kosmos.config.kernels import KernelsConfig
from megatron_kosmos.config.logging import LoggingConfig
from megatron_kosmos.config.model import ModelConfig
from megatron_kosmos.config.parallel import ParallelConfig
from megatron_kosmos.config.training import OptimizerConfig, TrainingConfig


class EvaluationConfig(StrictModel):
    """What is measured on `data.heldout` while the run goes on."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    sequences: PositiveInt = 64
    """Sequences of each held-out corpus that an evaluation reads."""
    captions: NonNegativeInt = 8
    """Pictures of held-out caption corpora that are captioned, and shown in TensorBoard."""
    caption_prompt: str = ""
    """Text that a caption goes on from, after the picture."""
    caption_tokens: PositiveInt = 16
    """Longest caption."""


class CheckpointConfig(StrictModel):
    """When checkpoints are written, and which are kept."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep those of steps that are multiples of this, for good; 0 keeps none besides the newest."""
    asynchronous: bool = True
    """Train on while a copy in host memory is written; false waits for the disk."""


class RunConfig(StrictModel):
    """Everything that defines a run. One YAML file holds it."""

    run_dir: Path
    """Folder of config.yaml, metrics.jsonl, tensorboard/ and checkpoints/."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig
    data: DataConfig
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        decoder, parallel = self.model.decoder, self.parallel
        for field, value in (
            ("model.decoder.num_heads", decoder.num_heads),
            ("model.decoder.ffn_width", decoder.ffn_width),
            ("model.decoder.vocab_multiple", decoder.vocab_multiple),
        ):
            if value % parallel.tensor_parallel_size:
                raise ValueError(
                    f"{field}={value} is not a multiple of "
                    f"parallel.tensor_parallel_size={parallel.tensor_parallel_size}"
                )
        groups = decoder.num_query_groups or decoder.num_heads
        if groups % parallel.tensor_parallel_size and parallel.tensor_parallel_size % groups:
            raise ValueError(
                f"model.decoder.num_query_groups={groups} and parallel.tensor_parallel_size="
                f"{parallel.tensor_parallel_size}: one must be a multiple of the other"
            )
        rows = (decoder.num_heads + 2 * groups) * decoder.head_size
        if rows % parallel.tensor_parallel_size:
            raise ValueError(
                f"model.decoder: the {rows} rows of queries, keys and values, (num_heads={decoder.num_heads} + 2 x "
                f"num_query_groups={groups}) x head size {decoder.head_size}, are not a multiple of "
                f"parallel.tensor_parallel_size={parallel.tensor_parallel_size}; change num_query_groups or width"
            )
        if self.data.sequence_length > decoder.max_sequence_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds "
                f"model.decoder.max_sequence_length={decoder.max_sequence_length}"
            )
        if self.data.sequence_length < self.model.resampler.num_latents + 4:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} holds no image of "
                f"model.resampler.num_latents={self.model.resampler.num_latents} slots, its two markers, <s> and </s>"
            )
        if parallel.sequence_parallel and self.data.sequence_length % parallel.tensor_parallel_size:
            raise ValueError(
                f"sequence_parallel: data.sequence_length={self.data.sequence_length} is not a multiple of "
                f"parallel.tensor_parallel_size={parallel.tensor_parallel_size}"
            )
        self._check_chunk_layers()
        if self.health.on_spike == "roll_back" and not self.checkpoint.every:
            raise ValueError("health.on_spike=roll_back goes back to a checkpoint: set checkpoint.every")
        if parallel.zero_stage == 0 and self.training.precision == "bf16":
            raise ValueError(
                "parallel.zero_stage=0 keeps no fp32 masters beside training.precision=bf16; use zero_stage 1, which "
                "costs nothing more, or fp32"
            )
        if self.optimizer.warmup_steps > self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} exceeds training.steps={self.training.steps}"
            )
        return self

    def _check_chunk_layers(self) -> None:
        num_layers, parallel = self.model.decoder.num_layers, self.parallel
        if parallel.chunk_layers is not None:
            if len(parallel.chunk_layers) != parallel.num_chunks or sum(parallel.chunk_layers) != num_layers:
                raise ValueError(
                    f"parallel.chunk_layers={list(parallel.chunk_layers)} must be {parallel.num_chunks} numbers "
                    f"(pipeline x virtual) that add up to model.decoder.num_layers={num_layers}"
                )
            if min(parallel.chunk_layers) < 1:
                raise ValueError(f"parallel.chunk_layers={list(parallel.chunk_layers)}: every chunk needs a layer")
        elif num_layers < parallel.num_chunks:
            raise ValueError(
                f"model.decoder.num_layers={num_layers} cannot be cut into {parallel.num_chunks} chunks "
                f"(pipeline x virtual); each needs a layer"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Return the data-parallel size under `world_size` ranks.

        Raises ConfigError when the ranks, the batch and the layout don't fit each other.
        """
        parallel, training = self.parallel, self.training
        if world_size % parallel.model_parallel_size:
            raise ConfigError(
                f"{world_size} processes cannot be cut into parallel.tensor_parallel_size="
                f"{parallel.tensor_parallel_size} x parallel.pipeline_parallel_size={parallel.pipeline_parallel_size}; "
                f"start a multiple of {parallel.model_parallel_size}"
            )
        size = world_size // parallel.model_parallel_size
        if training.global_batch_size % (training.micro_batch_size * size):
            raise ConfigError(
                f"training.global_batch_size={training.global_batch_size} is not a multiple of "
                f"training.micro_batch_size={training.micro_batch_size} x {size} data-parallel ranks"
            )
        num_microbatches = training.global_batch_size // (training.micro_batch_size * size)
        if parallel.virtual_pipeline_parallel_size > 1 and num_microbatches % parallel.pipeline_parallel_size:
            raise ConfigError(
                f"the interleaved schedule needs microbatches in multiples of parallel.pipeline_parallel_size="
                f"{parallel.pipeline_parallel_size}, not {num_microbatches}; change training.global_batch_size"
            )
        return size

    def num_microbatches(self, world_size: int) -> int:
        """Return the microbatches that each data-parallel rank runs in one step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size(world_size))
