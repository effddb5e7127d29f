"""A KOSMOS small enough to train in a second, and random batches of every kind for it."""

from dataclasses import replace
from typing import Any

import torch

from megatron_kosmos.batch import MultimodalBatch, row_starts
from megatron_kosmos.config import RunConfig
from megatron_kosmos.config.loader import parse_config
from megatron_kosmos.parallel.topology import Topology

LENGTH, LATENTS, SIDE, VOCAB, MICRO = 24, 3, 16, 90, 2
FIRST_DOCUMENT = 9
"""Tokens of the first of two documents in a row."""


def frozen_vision(num_layers: int) -> list[dict[str, Any]]:
    """Return the parameter groups that freeze the vision tower's first layers and what is below them."""
    if num_layers == 0:
        return []
    below = ["vision_tower.embeddings.*", "vision_tower.pre_layrnorm.*"]
    layers = [f"vision_tower.encoder.layers.{number}.*" for number in range(num_layers)]
    return [{"parameters": below + layers, "frozen": True}]


BASE: dict[str, Any] = {
    "run_dir": "unused",
    "model": {
        "decoder": {
            "num_layers": 4,
            "width": 32,
            "ffn_width": 64,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "vocab_multiple": 8,
            "max_sequence_length": LENGTH,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "vision": {
            "width": 16,
            "ffn_width": 32,
            "num_layers": 3,
            "num_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        "resampler": {"kind": "perceiver", "depth": 2, "num_latents": LATENTS, "num_heads": 2, "head_size": 8},
    },
    "training": {"steps": 10, "micro_batch_size": MICRO, "global_batch_size": 8, "precision": "fp32"},
    "optimizer": {
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "clip_grad_norm": 0.5,
        "weight_decay": 0.1,
        "groups": frozen_vision(1),
    },
    "data": {
        "tokenizer": "unused",
        "sequence_length": LENGTH,
        "train": [{"kind": "text", "prefix": "unused"}],
    },
}


def tiny_run(**changes: Any) -> RunConfig:
    """Return the tiny configuration with dotted `changes`, written `parallel__zero_stage=2`."""
    values = _copy(BASE)
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(values, "tests/distributed/tiny.py")


def step_batches(step: int, pattern: str) -> list[MultimodalBatch]:
    """Return the global batch of `step` as microbatches in order of their global index.

    `pattern` has a word for each step, repeated from the first when they run out, and in it a letter for each
    microbatch: t text alone, i images in every sequence, m one with and one without, d as m with two documents a row
    that don't see each other, e no target token at all.
    """
    words = pattern.split()
    letters = words[step % len(words)]
    return [_microbatch(1000 * step + index, letter) for index, letter in enumerate(letters)]


def rank_batches(step: int, pattern: str, topology: Topology) -> list[MultimodalBatch]:
    """Return the microbatches of one rank: every dp_size-th of the global ones, as far as the rank needs them."""
    mine = step_batches(step, pattern)[topology.dp_rank :: topology.dp_size]
    return [as_seen_by(topology, batch) for batch in mine]


def as_seen_by(topology: Topology, batch: MultimodalBatch) -> MultimodalBatch:
    """Return the batch with what the loader gives a rank: its share of images, tokens at the ends of the pipeline."""
    batch = batch.for_tensor_rank(topology.tp_rank, topology.tp_size)
    if not topology.is_first_stage:
        batch = replace(batch, images=batch.images[:0])
    if not topology.is_first_stage and not topology.is_last_stage:
        batch = replace(batch, input_ids=batch.input_ids[:, :0], labels=batch.labels[:, :0])
    return batch


def _microbatch(seed: int, letter: str) -> MultimodalBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, VOCAB, (MICRO, LENGTH + 1), generator=generator)
    mask = torch.rand(MICRO, LENGTH, generator=generator) < 0.7
    rows = {"t": [], "i": [0, 1], "m": [1], "d": [1], "e": []}[letter]
    positions = [(row, column) for row in rows for column in ((2, 12) if row else (5,))]
    for row, column in positions:
        ids[row, column : column + LATENTS] = 0
        mask[row, column - 1 : column + LATENTS - 1] = False
    if letter == "e":
        mask[:] = False
    starts = row_starts(MICRO, LENGTH)
    if letter == "d":
        starts = torch.cat((starts, starts[:-1] + FIRST_DOCUMENT)).sort().values
    return MultimodalBatch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=torch.cat([torch.arange(length) for length in starts.diff().tolist()]).view(MICRO, LENGTH),
        document_starts=starts,
        images=torch.randn(len(positions), 3, SIDE, SIDE, generator=generator),
        image_positions=torch.tensor(positions, dtype=torch.int64).view(-1, 2),
        sources=torch.tensor([(seed + row) % 3 for row in range(MICRO)]),
    )


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
