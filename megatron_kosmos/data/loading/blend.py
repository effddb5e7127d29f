"""Which corpus each sample of a run is of: shares that are exact at every index, and corpora that end."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

from megatron_kosmos.prompt import SourceKind


@dataclass(frozen=True)
class _Fork:
    """A group of corpora, parted in two."""

    left_weight: int
    weight: int
    left: "_Fork | int"
    right: "_Fork | int"

    def share_left(self, index: int) -> int:
        """Return how many of the group's first `index` samples are of its left part."""
        return (2 * index * self.left_weight + self.weight) // (2 * self.weight)


_Path = tuple[tuple[_Fork, bool], ...]
"""The forks above a corpus from the root on, and whether it is to their left."""


class Blend:
    """Spreads samples over corpora so that after any number of them each corpus has its share, give or take two.

    The corpora are the leaves of a Huffman tree. Of the first n samples of a group, its left part gets n · share,
    rounded. The rounding errors on the way to a leaf add up to less than 2, for they shrink with the leaf's share and
    the shares grow towards the root at least as Fibonacci's numbers do; for the paper's corpora they stay below 1.
    Integers keep it exact for any index, which is found in as many steps as the tree is deep.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
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
        self._paths = dict(_paths(self._root))

    def locate(self, index: int) -> tuple[int, int]:
        """Return the corpus of sample `index`, and how many earlier samples are of that corpus."""
        node = self._root
        while isinstance(node, _Fork):
            to_left = node.share_left(index)
            if node.share_left(index + 1) > to_left:
                node, index = node.left, to_left
            else:
                node, index = node.right, index - to_left
        return node, index

    def count(self, index: int, corpus: int) -> int:
        """Return how many of the first `index` samples are of `corpus`."""
        for node, is_left in self._paths[corpus]:
            to_left = node.share_left(index)
            index = to_left if is_left else index - to_left
        return index

    def find(self, corpus: int, number: int) -> int:
        """Return the index of the sample of `corpus` that `number` earlier ones are of."""
        low, high = 0, 1
        while self.count(high, corpus) <= number:
            low, high = high, 2 * high
        return bisect_right(range(high), number, lo=low, key=lambda index: self.count(index, corpus)) - 1


def _paths(node: _Fork | int, above: _Path = ()) -> Iterator[tuple[int, _Path]]:
    """Yield each corpus below `node` with its path."""
    if isinstance(node, _Fork):
        yield from _paths(node.left, (*above, (node, True)))
        yield from _paths(node.right, (*above, (node, False)))
    else:
        yield node, above


@dataclass(frozen=True)
class Share:
    """What a corpus has in the mixture."""

    kind: SourceKind
    weight: float | Fraction
    """Share of the rows, in any unit."""
    num_rows: int | None = None
    """Rows after which it ends; None: never."""


@dataclass(frozen=True)
class _Stretch:
    """Samples between two ends of corpora."""

    first: int
    corpora: tuple[int, ...]
    blend: Blend
    before: dict[int, int]
    """Rows that each of its corpora gave before."""


class EndingBlend:
    """A blend of corpora some of which end.

    The weight of one that ends goes to the others of its kind, in proportion to theirs, and to all others when it was
    the last of its kind. From there on the blend starts anew with the new weights.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        self.ends: dict[int, int] = {}
        """Corpora in the order in which they end, each with the first sample that it is no longer there for."""
        self._stretches: list[_Stretch] = []
        weights = {corpus: Fraction(str(share.weight)) for corpus, share in enumerate(shares)}
        drawn = dict.fromkeys(weights, 0)
        first = 0
        while weights:
            corpora = tuple(weights)
            blend = Blend([weights[corpus] for corpus in corpora])
            self._stretches.append(_Stretch(first, corpora, blend, dict(drawn)))
            ends = {
                corpus: blend.find(leaf, num_rows - drawn[corpus])
                for leaf, corpus in enumerate(corpora)
                if (num_rows := shares[corpus].num_rows) is not None
            }
            if not ends:
                break
            ended = min(ends, key=ends.__getitem__)
            for leaf, corpus in enumerate(corpora):
                drawn[corpus] += blend.count(ends[ended], leaf)
            first += ends[ended]
            self.ends[ended] = first
            _hand_on(weights, ended, shares)
        self.num_samples = None if weights else first
        """Samples until every corpus has ended; None: no end."""

    def locate(self, index: int) -> tuple[int, int]:
        """Return the corpus of sample `index`, and how many earlier samples are of that corpus.

        Raises IndexError when all corpora have ended before.
        """
        if self.num_samples is not None and index >= self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        stretch = self._stretches[bisect_right(self._stretches, index, key=lambda stretch: stretch.first) - 1]
        leaf, number = stretch.blend.locate(index - stretch.first)
        corpus = stretch.corpora[leaf]
        return corpus, stretch.before[corpus] + number


def _hand_on(weights: dict[int, Fraction], ended: int, shares: Sequence[Share]) -> None:
    """Take `ended` out of `weights` and give its weight to those of its kind, or to all."""
    weight = weights.pop(ended)
    heirs = [corpus for corpus in weights if shares[corpus].kind == shares[ended].kind] or list(weights)
    total = sum(weights[corpus] for corpus in heirs)
    for corpus in heirs:
        weights[corpus] += weight * weights[corpus] / total
