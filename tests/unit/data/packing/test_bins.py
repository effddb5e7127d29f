"""Items are placed as a naive best fit would place them, in rows that hold them, and the rows come out full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_kosmos.data.packing.bins import best_fit, best_fit_decreasing

CAPACITY = 30
lengths = st.lists(st.integers(1, CAPACITY), max_size=80)


def naive_best_fit(lengths: list[int], max_open: int) -> list[list[int]]:
    """Return the items of each row, by the definition."""
    rows: list[list[int]] = []
    open_rows: list[int] = []
    shortest = min(lengths, default=0)
    for item, length in enumerate(lengths):

        def space(row: int) -> int:
            return CAPACITY - sum(lengths[other] for other in rows[row])

        open_rows = [row for row in open_rows if space(row) >= shortest]
        fitting = [row for row in open_rows if space(row) >= length]
        if fitting:
            rows[min(fitting, key=lambda row: (space(row), row))].append(item)
            continue
        if len(open_rows) == max_open:
            open_rows.remove(min(open_rows, key=lambda row: (space(row), row)))
        open_rows.append(len(rows))
        rows.append([item])
    return rows


def items_of(rows: NDArray[np.int64]) -> list[list[int]]:
    return [np.flatnonzero(rows == row).tolist() for row in range(int(rows.max(initial=-1)) + 1)]


@given(lengths=lengths, max_open=st.integers(1, 6))
def test_each_item_goes_to_the_fullest_open_row_that_it_fits(lengths: list[int], max_open: int) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), CAPACITY, max_open)
    assert items_of(rows) == naive_best_fit(lengths, max_open)


@given(lengths=lengths)
def test_the_longest_items_are_placed_first(lengths: list[int]) -> None:
    rows = items_of(best_fit_decreasing(np.array(lengths, dtype=np.int64), CAPACITY))
    naive = naive_best_fit(sorted(lengths, reverse=True), max_open=1000)
    in_order = sorted(lengths, reverse=True)
    # Of two rows with the same space either is the fullest: how full rows get does not depend on which is taken.
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(
        sum(in_order[i] for i in row) for row in naive
    )
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))


def test_rows_come_out_full() -> None:
    """0.985 online and 0.999 offline for lengths like those of web pages."""
    sizes = np.clip(np.random.default_rng(0).lognormal(5.6, 1.1, 50_000).astype(np.int64), 4, 2048)
    fill = {pack: sizes.sum() / ((pack(sizes, 2048).max() + 1) * 2048) for pack in (best_fit, best_fit_decreasing)}
    assert fill[best_fit] > 0.99
    assert fill[best_fit_decreasing] > 0.9995


@pytest.mark.parametrize("pack", [best_fit, best_fit_decreasing])
def test_an_item_longer_than_a_row_is_refused(pack: object) -> None:
    assert callable(pack)
    with pytest.raises(ValueError, match="an item of 31 tokens does not fit a row of 30"):
        pack(np.array([3, 31]), CAPACITY)
