"""megatron_kosmos: pre-training of KOSMOS-1-style multimodal language models on megatron-core and DeepSpeed."""

__version__ = "0.1.0"
