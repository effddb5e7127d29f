"""Tokenizers: text to ids and back, special tokens that no text can produce, training and importing."""
