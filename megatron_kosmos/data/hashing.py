"""SplitMix64 (Steele et al. 2014) for orders and choices that may never change: numpy's own generators may."""

from collections.abc import Iterator
from itertools import count

import numpy as np

from megatron_kosmos.data.arrays import Int64Array, Uint64Array

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """Return the hash, of 64 bits, of a number of 64 bits."""
    x = (x + STEP) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def mix_all(x: Uint64Array) -> Uint64Array:
    """Return the hash of each of the numbers."""
    return _scramble(x + np.uint64(STEP))  # arrays wrap around as it wants


def _scramble(x: Uint64Array) -> Uint64Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(num_items: int, seed: int, *stream: int) -> Int64Array:
    """Return a permutation of 0 … num_items - 1 that depends on nothing but the arguments: items sorted by hashes."""
    key = _key(seed, stream)
    hashes = _scramble(np.arange(num_items, dtype=np.uint64) * np.uint64(STEP) + np.uint64(key))
    return np.argsort(hashes, kind="stable")


def _key(seed: int, stream: tuple[int, ...]) -> int:
    key = seed & MASK
    for number in stream:
        key = mix(key ^ mix(number & MASK))
    return key


def uniforms(seed: int, *stream: int) -> Iterator[float]:
    """Yield numbers in [0, 1), without end, that depend on nothing but the arguments."""
    key = _key(seed, stream)
    for number in count():
        yield (mix(key + number * STEP & MASK) >> 11) * 2.0**-53
