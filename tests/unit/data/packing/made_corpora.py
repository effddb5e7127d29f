"""Corpora of a few made-up ids in the real file formats, and what their documents are as streams of tokens."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.corpora.manifest import Job, PreparationSettings
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.assembly import assemble
from megatron_kosmos.data.preparation.encoding import EncodedChunk, EncodedImage
from megatron_kosmos.data.preparation.parts_folder import PartsFolder
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

PAD, BOS, EOS, IMAGE, END = 0, 1, 2, 4, 5
PICTURE = "picture"
Parts = list[int | str]
"""A document: ids of text, and pictures."""


def folder_in_memory() -> TemporaryDirectory[str]:
    """Return a folder that is on disk at once, and goes at the end of its block."""
    return TemporaryDirectory(dir="/dev/shm")


def make_corpus(folder: Path, kind: SourceKind, documents: list[Parts], tokenizer: KosmosTokenizer) -> Corpus:
    """Write `documents` as a real corpus; a picture's bytes are never decoded here."""
    prefix = folder / "corpus"
    ids, images_of = list[list[int]](), list[list[EncodedImage]]()
    for document in documents:
        tokens, images = [BOS], list[EncodedImage]()
        for part in document:
            if isinstance(part, int):
                tokens.append(part)
            else:
                images.append(EncodedImage(b"x", "png", len(tokens)))
                tokens += [IMAGE, END]
        ids.append([*tokens, EOS])
        images_of.append(images)
    lengths = np.array([len(tokens) for tokens in ids])
    chunk = EncodedChunk(np.concatenate(ids).astype("<u2"), lengths, images_of, np.zeros((len(ids), 2), np.uint64))
    settings = PreparationSettings(filters=Filters(), row_format=RowFormat(), max_shard_bytes=1 << 30, part_bytes=1)
    job = Job(
        kind=kind,
        sources=(),
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        settings=settings,
    )
    parts = PartsFolder(prefix)
    parts.create(job)
    with parts.writing(job, 0) as writer:
        writer.append(chunk)
    assemble(parts, job, 1)
    return Corpus(CorpusConfig(kind=kind, prefix=prefix), tokenizer)


def stream_of(documents: list[Parts], num_latents: int) -> list[tuple[int, bool, int]]:
    """Return the epoch as (id, is text, document) one token after the other, written down naively."""
    stream: list[tuple[int, bool, int]] = []
    for number, document in enumerate(documents):
        stream.append((BOS, False, number))
        for part in document:
            block = [IMAGE, *[PAD] * num_latents, END]
            stream += [(part, True, number)] if isinstance(part, int) else [(i, False, number) for i in block]
        stream.append((EOS, True, number))
    return stream
