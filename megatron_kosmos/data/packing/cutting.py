"""Cutting a stream of tokens everywhere but inside blocks, which are pictures with their markers, or captions.

Shape letters: T tokens of a row, D documents.
"""

from array import array
from bisect import bisect_left

import numpy as np

from megatron_kosmos.data.arrays import Int64Array


def cut_rows(
    total: int, block_starts: Int64Array, block_stops: Int64Array, length: int
) -> tuple[Int64Array, Int64Array]:
    """Cut a stream of `total` tokens into rows of at most `length` that cut no block; return their starts and stops.

    Blocks are sorted, disjoint and at most `length` long.
    """
    if len(block_starts) == 0:
        starts = np.arange(0, total, length, dtype=np.int64)
        return starts, np.minimum(starts + length, total)
    first, last = array("q", block_starts.tobytes()), array("q", block_stops.tobytes())
    cuts = array("q", [0])
    cut, block = 0, 0
    while cut + length < total:
        cut += length
        block = bisect_left(first, cut, lo=block) - 1  # the last block that starts before the cut
        if block >= 0 and last[block] > cut:
            cut = first[block]
        block = max(block, 0)
        if cut <= cuts[-1]:
            raise ValueError(f"the block at {cut} has {last[block] - cut} tokens, a row {length}")
        cuts.append(cut)
    cuts.append(total)
    edges = np.frombuffer(cuts, dtype=np.int64)
    return edges[:-1], edges[1:]


def cut_documents(
    document_starts: Int64Array, block_starts: Int64Array, block_stops: Int64Array, length: int
) -> Int64Array:
    """Cut each document of a stream into pieces of at most `length` tokens, as long as they may be, that cut no block.

    `document_starts` is [D + 1], the stream's end included. Returns where pieces start, sorted, documents' starts
    included. All documents are cut at once, so that the longest determines how many steps it takes.
    """
    at, stops = document_starts[:-1], document_starts[1:]
    cuts = [at]
    while len(at):
        is_longer = at + length < stops
        before, stops = at[is_longer], stops[is_longer]
        at = before + length
        if len(block_starts):
            block = np.maximum(np.searchsorted(block_starts, at) - 1, 0)  # the last one that starts before the cut
            is_inside = (block_starts[block] < at) & (block_stops[block] > at)
            at = np.where(is_inside, block_starts[block], at)
        if np.any(at <= before):
            raise ValueError(f"a block is longer than a row of {length}")
        cuts.append(at)
    return np.sort(np.concatenate(cuts))
