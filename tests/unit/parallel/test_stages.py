"""Cutting the decoder into chunks: as even as can be, and dealt out to stages in the order of the pipeline."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kosmos.parallel.stages import Chunk, balance_layers, chunks_of_stage

COSTS = st.one_of(st.integers(0, 12).map(float), st.floats(0.0, 12.0))


def all_cuts(num_layers: int, num_chunks: int) -> list[tuple[int, ...]]:
    """Every way to cut layers into chunks of at least one."""
    return [
        tuple(end - start for start, end in zip((0, *inner), (*inner, num_layers), strict=True))
        for inner in combinations(range(1, num_layers), num_chunks - 1)
    ]


def loads(cut: tuple[int, ...], first_cost: float, last_cost: float) -> list[float]:
    costs = [float(layers) for layers in cut]
    costs[0] += first_cost
    costs[-1] += last_cost
    return costs


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2)]), st.integers(0, 6), COSTS, COSTS)
def test_no_cut_has_a_cheaper_dearest_stage(
    sizes: tuple[int, int], spare: int, first_cost: float, last_cost: float
) -> None:
    pp_size, num_chunks = sizes[0], sizes[0] * sizes[1]
    cuts = all_cuts(num_chunks + spare, num_chunks)
    chosen = balance_layers(num_chunks + spare, *sizes, first_cost, last_cost)
    assert chosen in cuts

    def dearest_stage(cut: tuple[int, ...]) -> float:
        return max(sum(loads(cut, first_cost, last_cost)[rank::pp_size]) for rank in range(pp_size))

    def dearest_chunks(cut: tuple[int, ...]) -> list[float]:
        return [max(loads(cut, first_cost, last_cost)[rank::pp_size]) for rank in range(pp_size)]

    assert dearest_stage(chosen) == pytest.approx(min(map(dearest_stage, cuts)), abs=1e-9)
    layers_of_stages = [sum(chosen[rank::pp_size]) for rank in range(pp_size)]
    alike = [cut for cut in cuts if [sum(cut[rank::pp_size]) for rank in range(pp_size)] == layers_of_stages]
    for rank, dearest in enumerate(dearest_chunks(chosen)):
        assert dearest == pytest.approx(min(dearest_chunks(cut)[rank] for cut in alike), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 5), st.integers(0, 8), COSTS, COSTS)
def test_parts_in_the_middle_differ_by_one_layer_and_the_earlier_is_smaller(
    num_chunks: int, spare: int, first_cost: float, last_cost: float
) -> None:
    middle = balance_layers(num_chunks + spare, num_chunks, 1, first_cost, last_cost)[1:-1]
    assert list(middle) == sorted(middle)
    assert middle[-1] - middle[0] <= 1


@pytest.mark.parametrize(
    "num_layers, sizes, first_cost, last_cost, expected",
    [
        (24, (1, 1), 6.0, 2.4, (24,)),
        (24, (4, 1), 0.0, 0.0, (6, 6, 6, 6)),
        (7, (3, 1), 0.0, 0.0, (2, 2, 3)),
        (8, (3, 1), 0.0, 0.0, (2, 3, 3)),
        (24, (2, 1), 2.0, 2.0, (12, 12)),
        (24, (2, 1), 6.0, 0.0, (9, 15)),
        (24, (2, 1), 0.0, 6.0, (15, 9)),
        (3, (2, 1), 1.0, 1.0, (1, 2)),  # a tie: the later part gets the layer
        (5, (4, 1), 100.0, 100.0, (1, 1, 2, 1)),  # no part is empty, however dear its end
        (24, (2, 2), 2.0, 0.0, (4, 6, 7, 7)),  # 13 each with the first stage's 2, not chunks of 6 or 7 with 14 to 12
    ],
)
def test_cuts(
    num_layers: int, sizes: tuple[int, int], first_cost: float, last_cost: float, expected: tuple[int, ...]
) -> None:
    assert balance_layers(num_layers, *sizes, first_cost, last_cost) == expected


def test_stages_take_turns_over_the_chunks() -> None:
    """Two stages of two chunks: layers 0 | 1-2 | 3-5 | 6-9."""
    first, second = (chunks_of_stage((1, 2, 3, 4), pp_rank, pp_size=2) for pp_rank in (0, 1))
    assert first == (
        Chunk(index=0, virtual_index=0, first_layer=0, num_layers=1, is_first=True, is_last=False),
        Chunk(index=2, virtual_index=1, first_layer=3, num_layers=3, is_first=False, is_last=False),
    )
    assert second == (
        Chunk(index=1, virtual_index=0, first_layer=1, num_layers=2, is_first=False, is_last=False),
        Chunk(index=3, virtual_index=1, first_layer=6, num_layers=4, is_first=False, is_last=True),
    )


def test_a_single_chunk_is_first_and_last() -> None:
    assert chunks_of_stage((5,), 0, 1) == (Chunk(0, 0, 0, 5, is_first=True, is_last=True),)


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_layer_is_on_one_stage(pp_size: int, virtual_size: int, data: st.DataObject) -> None:
    num_chunks = pp_size * virtual_size
    chunk_layers = data.draw(st.lists(st.integers(1, 5), min_size=num_chunks, max_size=num_chunks))
    stages = [chunks_of_stage(chunk_layers, pp_rank, pp_size) for pp_rank in range(pp_size)]
    chunks = sorted((chunk for stage in stages for chunk in stage), key=lambda chunk: chunk.index)
    layers = [chunk.first_layer + offset for chunk in chunks for offset in range(chunk.num_layers)]
    assert layers == list(range(sum(chunk_layers)))
    assert all([chunk.virtual_index for chunk in stage] == list(range(virtual_size)) for stage in stages)
    assert stages[0][0].is_first
    assert stages[-1][-1].is_last
    assert sum(chunk.is_first + chunk.is_last for chunk in chunks) == 2
