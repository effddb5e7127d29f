"""The settings of a run: strict schema, loader and overrides. Knows nothing of torch."""

from megatron_kosmos.config.data import CorpusConfig, DataConfig
from megatron_kosmos.config.errors import ConfigError
from megatron_kosmos.config.loader import load_config, parse_config, save_config
from megatron_kosmos.config.model import DecoderConfig, ModelConfig, ResamplerConfig, VisionConfig
from megatron_kosmos.config.parallel import ParallelConfig
from megatron_kosmos.config.run import CheckpointConfig, EvaluationConfig, LoggingConfig, RunConfig
from megatron_kosmos.config.training import OptimizerConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "CorpusConfig",
    "DataConfig",
    "DecoderConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ResamplerConfig",
    "RunConfig",
    "TrainingConfig",
    "VisionConfig",
    "load_config",
    "parse_config",
    "save_config",
]
