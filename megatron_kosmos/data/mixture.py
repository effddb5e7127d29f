"""The order of training: which row of which corpus a sample is, as a pure function of the seed and the sample's index.

Nothing is drawn one after the other, so there is no state: a run resumes with one integer, under any number of
data-parallel ranks and worker processes (docs/decisions/0005).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np

from megatron_kosmos.data.packing import EpochPlan, Int64Array, PackedRow, Packer

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class _Fork:
    """A group of corpora, parted in two."""

    left_weight: int
    weight: int
    left: "_Fork | int"
    right: "_Fork | int"


class Blend:
    """Spreads samples over corpora so that after any number of them each corpus has its share, give or take two.

    The corpora are the leaves of a Huffman tree. Of the first n samples of a group, its left part gets n · share,
    rounded. The rounding errors on the way to a leaf add up to less than 2, for they shrink with the leaf's share and
    the shares grow towards the root at least as Fibonacci's numbers do; for the paper's corpora they stay below 1.
    Integers keep it exact for any index, which is found in as many steps as the tree is deep.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Take the corpora's shares of the rows, in any unit; 0.2 means one fifth, not its binary neighbour."""
        shares = [Fraction(str(weight)) for weight in weights]
        unit = math.lcm(*(share.denominator for share in shares))
        # The second item decides between equal weights; the third is never compared.
        heap: list[tuple[int, int, _Fork | int]] = [
            (int(share * unit), corpus, corpus) for corpus, share in enumerate(shares)
        ]
        heapify(heap)
        for number in range(len(shares), 2 * len(shares) - 1):
            (left_weight, _, left), (right_weight, _, right) = heappop(heap), heappop(heap)
            weight = left_weight + right_weight
            heappush(heap, (weight, number, _Fork(left_weight, weight, left, right)))
        ((_, _, self._root),) = heap

    def locate(self, index: int) -> tuple[int, int]:
        """Return the corpus of sample `index`, and how many earlier samples are of that corpus."""
        node = self._root
        while isinstance(node, _Fork):
            to_left = (2 * index * node.left_weight + node.weight) // (2 * node.weight)
            if (2 * (index + 1) * node.left_weight + node.weight) // (2 * node.weight) > to_left:
                node, index = node.left, to_left
            else:
                node, index = node.right, index - to_left
        return node, index


def shuffled(num_items: int, seed: int, *stream: int) -> Int64Array:
    """Return a permutation of 0 … num_items - 1 that depends on nothing but the arguments.

    Items are sorted by SplitMix64 hashes (Steele et al. 2014): numpy's own generators may change between versions.
    """
    key = seed & MASK
    for number in stream:
        key = _mix(key ^ _mix(number & MASK))
    # The same mixing, for all items at once; uint64 arrays wrap around as it wants.
    x = np.arange(num_items, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


class Epochs:
    """The endless rows of one corpus: epoch after epoch, its documents in another order each time."""

    def __init__(self, packer: Packer, seed: int, stream: int) -> None:
        self._packer, self._seed, self._stream = packer, seed, stream
        self._first_rows = [0]
        """Rows before each epoch that was planned so far. Epochs differ in rows, since padding falls differently."""
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> EpochPlan:
        documents = self._packer.documents
        return self._packer.plan(documents[shuffled(len(documents), self._seed, self._stream, epoch)])

    def locate(self, number: int) -> tuple[int, int]:
        """Return the epoch of the corpus's row `number`, and the row within the epoch.

        The first call for an epoch plans the ones before it: about a second for each million documents.
        """
        while self._first_rows[-1] <= number:
            self._first_rows.append(self._first_rows[-1] + self._plan(len(self._first_rows) - 1).num_rows)
        epoch = bisect_right(self._first_rows, number) - 1
        return epoch, number - self._first_rows[epoch]

    def row(self, number: int) -> PackedRow:
        """Return the corpus's row `number`, counted over all epochs."""
        epoch, row = self.locate(number)
        return self._packer.row(self._plan(epoch), row)


@dataclass(frozen=True)
class Sample:
    """One training sequence and where it comes from."""

    corpus: int
    row: PackedRow


class Mixture:
    """The samples of a run."""

    def __init__(self, packers: Sequence[Packer], weights: Sequence[float], seed: int) -> None:
        self._blend = Blend(weights)
        self._epochs = [Epochs(packer, seed, stream) for stream, packer in enumerate(packers)]

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with the global `index`."""
        corpus, number = self._blend.locate(index)
        return Sample(corpus, self._epochs[corpus].row(number))
