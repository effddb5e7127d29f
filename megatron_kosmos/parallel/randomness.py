"""Random streams that are derived, never carried: every dropout mask follows from where and when it is drawn.

megatron-core's own seeding gives all pipeline stages and data-parallel ranks the same masks; here each microbatch of
each chunk starts both of its streams anew, so there is nothing to checkpoint and a resumed run draws the same masks.
"""

import hashlib

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_kosmos.parallel.topology import Topology

_SHARDED_STREAM = "model-parallel-rng"  # the name that megatron-core's modules ask for


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and its place. Equal parts give equal seeds anywhere."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_microbatch(seed: int, step: int, microbatch: int, chunk_index: int, topology: Topology) -> None:
    """Start this rank's random streams for one microbatch's forward pass through one chunk.

    The default stream is the same on all tensor-parallel ranks (activations they hold alike), the tracker's
    sharded stream differs between them (activations that they share out). Recompute replays both.
    """
    place = (seed, step, microbatch, topology.dp_rank, chunk_index)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(_SHARDED_STREAM, derive_seed(*place, "tp", topology.tp_rank))
    torch.manual_seed(derive_seed(*place))
