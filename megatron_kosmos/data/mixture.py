"""The order of training: which row of which corpus a sample is, as a pure function of the seed and the sample's index.

Nothing is drawn one after the other, so there is no state: a run resumes with one integer, under any number of
data-parallel ranks and worker processes (D5).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megatron_kosmos.data.packing import EpochPlan, Int64Array, PackedRow, Packer

MASK = (1 << 64) - 1


class Blend:
    """Spreads samples over corpora so that after any number of them each corpus has its share, ± 1 row.

    The corpora are halved again and again; at each halving the first of n samples go to the left half `n · share`
    times, rounded. Exact integers: no drift, and any index is found in log2(corpora) steps.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Take the corpora's shares of the rows, in any unit; 0.2 means one fifth, not its binary neighbour."""
        shares = [Fraction(str(weight)) for weight in weights]
        unit = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * unit) for share in shares]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the corpus of sample `index`, and how many earlier samples are of that corpus."""
        low, high = 0, len(self._weights)
        while high - low > 1:
            middle = (low + high) // 2
            left, both = sum(self._weights[low:middle]), sum(self._weights[low:high])
            to_left = (2 * index * left + both) // (2 * both)
            if (2 * (index + 1) * left + both) // (2 * both) > to_left:
                high, index = middle, to_left
            else:
                low, index = middle, index - to_left
        return low, index


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
