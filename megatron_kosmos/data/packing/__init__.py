"""Packing: which documents, or pieces of them, fill which rows of an epoch."""
