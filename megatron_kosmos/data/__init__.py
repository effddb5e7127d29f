"""From source documents to batches: tokenizer, prepared corpora, packing, mixture, loader."""

from megatron_kosmos.data.corpus import data_fingerprint

__all__ = ["data_fingerprint"]
