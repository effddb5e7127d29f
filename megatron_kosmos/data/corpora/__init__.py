"""Prepared corpora: their files, written to be read at random, and checked when they are opened."""
