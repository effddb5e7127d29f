"""The settings of a run: strict schema, loader and overrides. Knows nothing of torch."""

from megatron_kosmos.config.data import AugmentationConfig, CorpusConfig, DataConfig
from megatron_kosmos.config.errors import ConfigError
from megatron_kosmos.config.health import HealthConfig
from megatron_kosmos.config.kernels import KernelsConfig
from megatron_kosmos.config.loader import find_run_dir, load_config, parse_config, save_config
from megatron_kosmos.config.logging import LoggingConfig, MlflowConfig, WandbConfig
from megatron_kosmos.config.model import (
    CrossAttentionConfig,
    DecoderConfig,
    ModelConfig,
    PerceiverConfig,
    ResamplerConfig,
    VisionConfig,
)
from megatron_kosmos.config.parallel import ParallelConfig
from megatron_kosmos.config.run import CheckpointConfig, EvaluationConfig, RunConfig
from megatron_kosmos.config.training import OptimizerConfig, ParameterGroupConfig, TrainingConfig

__all__ = [
    "AugmentationConfig",
    "CheckpointConfig",
    "ConfigError",
    "CorpusConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "DecoderConfig",
    "EvaluationConfig",
    "HealthConfig",
    "KernelsConfig",
    "LoggingConfig",
    "MlflowConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroupConfig",
    "PerceiverConfig",
    "ResamplerConfig",
    "RunConfig",
    "TrainingConfig",
    "VisionConfig",
    "WandbConfig",
    "find_run_dir",
    "load_config",
    "parse_config",
    "save_config",
]
