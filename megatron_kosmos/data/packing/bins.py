"""Filling rows with whole items: best fit as they come (online), or the longest first (offline).

Both return which row each item goes to, and depend on nothing but the lengths and their order.

Shape letters: N items.
"""

from array import array
from bisect import bisect_left, insort

import numpy as np

from megatron_kosmos.data.arrays import Int64Array

OPEN_ROWS = 256
"""Rows that best fit keeps open; for another, the fullest is closed. They are found by bisection: more cost little."""
CHUNK = 1 << 18
"""Items that are Python integers at a time, so that memory stays bounded."""
ROW_BITS = 40


def best_fit(lengths: Int64Array, capacity: int, max_open: int = OPEN_ROWS) -> Int64Array:
    """Return the row of each item [N]: the fullest open row that it fits, one item after the other.

    At most `max_open` rows are open, whatever N is. Raises ValueError for an item longer than `capacity`.
    """
    _check(lengths, capacity)
    shortest = int(lengths.min(initial=capacity)) << ROW_BITS  # a row with less space takes nothing any more
    row_mask = (1 << ROW_BITS) - 1
    rows = array("q")
    open_rows: list[int] = []
    """Sorted by space, then row; an integer for both, space << ROW_BITS | row, is the fastest to bisect."""
    num_rows = 0
    for first in range(0, len(lengths), CHUNK):
        for need in (lengths[first : first + CHUNK].astype(np.int64) << ROW_BITS).tolist():
            place = bisect_left(open_rows, need)
            if place < len(open_rows):
                entry = open_rows.pop(place) - need
            else:
                if place == max_open:
                    del open_rows[0]
                entry = (capacity << ROW_BITS) + num_rows - need
                num_rows += 1
            rows.append(entry & row_mask)
            if entry >= shortest:
                insort(open_rows, entry)
    return np.array(rows, dtype=np.int64)


def best_fit_decreasing(lengths: Int64Array, capacity: int) -> Int64Array:
    """Return the row of each item [N]: the longest item first, each into the fullest row that it fits.

    Items of one length and rows of one space are placed together (the histograms of arXiv 2107.02027), so that the
    steps grow with `capacity` and hardly with N. Raises ValueError for an item longer than `capacity`.
    """
    _check(lengths, capacity)
    sort_key = (capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int64)  # uint16: sorted by radix
    longest_first = np.argsort(sort_key, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    rows = np.empty(len(lengths), dtype=np.int64)
    spaces = _Spaces()
    placed, num_rows = 0, 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            run = spaces.take(length)
            if run is None:
                run = capacity, num_rows, -(-left // (capacity // length))
                num_rows += run[2]
            space, first, number = run
            # A row that took one item is the fullest then, so it takes the next ones too, as many as fit.
            most = space // length
            full = min(number, left // most)
            rest = left - full * most if full < number else 0
            for num_same, num_items in ((full, most), (1 if rest else 0, rest), (number - full - bool(rest), 0)):
                size = num_same * num_items
                rows[placed : placed + size] = np.repeat(np.arange(first, first + num_same), num_items)
                spaces.put(space - num_items * length, first, num_same)
                placed, left, first = placed + size, left - size, first + num_same
    result = np.empty_like(rows)
    result[longest_first] = rows
    return result


class _Spaces:
    """Rows by the space that is left in them, as runs of consecutive numbers."""

    def __init__(self) -> None:
        self._levels: list[int] = []
        """The spaces that some row has, sorted."""
        self._runs: dict[int, list[tuple[int, int]]] = {}

    def take(self, length: int) -> tuple[int, int, int] | None:
        """Take a run out of the smallest space of at least `length`: space, first row, number of rows."""
        place = bisect_left(self._levels, length)
        if place == len(self._levels):
            return None
        space = self._levels[place]
        first, number = self._runs[space].pop()
        if not self._runs[space]:
            del self._runs[space], self._levels[place]
        return space, first, number

    def put(self, space: int, first: int, number: int) -> None:
        """Take note of `number` rows from `first` on that have `space` left."""
        if number and space:
            if space not in self._runs:
                insort(self._levels, space)
                self._runs[space] = []
            self._runs[space].append((first, number))


def _check(lengths: Int64Array, capacity: int) -> None:
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        raise ValueError(f"an item of {longest} tokens does not fit a row of {capacity}")
