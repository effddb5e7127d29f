"""From source documents to batches: tokenizer, prepared corpora, packing, mixture, loader."""
