"""The learning rate at every turn of the schedule."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kosmos.config import OptimizerConfig
from megatron_kosmos.optim.schedule import learning_rate

PEAK, FLOOR, WARMUP, STEPS = 2e-4, 2e-5, 4, 12


def settings(**changes: Any) -> OptimizerConfig:
    values: dict[str, Any] = {
        "learning_rate": PEAK,
        "min_learning_rate": FLOOR,
        "warmup_steps": WARMUP,
        "decay": "linear",
    }
    return OptimizerConfig(**values | changes)


def series(**changes: Any) -> list[float]:
    return [learning_rate(settings(**changes), step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_warm_up_rises_by_equal_steps_and_ends_at_the_peak(decay: str) -> None:
    """The first step is not wasted on a rate of zero; the fourth has the whole rate, and so has the fifth."""
    assert series(decay=decay)[:5] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK, PEAK])


def test_linear_decay_falls_by_equal_steps() -> None:
    after = series()[WARMUP:]
    fall = (PEAK - FLOOR) / 8
    assert after == pytest.approx([PEAK - fall * step for step in range(8)])
    assert learning_rate(settings(), STEPS, STEPS) == pytest.approx(FLOOR)


def test_cosine_decay_is_half_way_in_the_middle_and_flat_at_both_ends() -> None:
    after = series(decay="cosine")[WARMUP:]
    assert after[4] == pytest.approx((PEAK + FLOOR) / 2)
    assert after[2] == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 + math.sqrt(0.5)) / 2)
    falls = [earlier - later for earlier, later in pairwise(after)]
    assert falls[0] < falls[2] > falls[-1]
    assert learning_rate(settings(decay="cosine"), STEPS, STEPS) == pytest.approx(FLOOR)


def test_constant_stays_at_the_peak_whatever_the_floor() -> None:
    assert series(decay="constant")[WARMUP:] == [PEAK] * 8


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert series(warmup_steps=0)[0] == PEAK


def test_a_run_that_only_warms_up_reaches_the_peak_at_its_end() -> None:
    assert series(warmup_steps=STEPS)[-1] == PEAK


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(1, 50),
    st.integers(0, 50),
    st.sampled_from([0.0, FLOOR]),
)
def test_it_never_leaves_its_bounds_nor_rises_after_warm_up(
    decay: str, num_steps: int, warmup_steps: int, floor: float
) -> None:
    optimizer = settings(decay=decay, warmup_steps=min(warmup_steps, num_steps), min_learning_rate=floor)
    rates = [learning_rate(optimizer, step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in rates)
    after = rates[optimizer.warmup_steps :]
    assert all(earlier >= later >= floor for earlier, later in pairwise(after))


def test_the_paper_s_schedule() -> None:
    """375 steps up to 2e-4, then linearly to zero at step 300,000."""
    paper = settings(learning_rate=2e-4, min_learning_rate=0.0, warmup_steps=375)
    assert learning_rate(paper, 374, 300_000) == pytest.approx(2e-4)
    assert learning_rate(paper, (300_000 + 375) // 2, 300_000) == pytest.approx(1e-4, rel=1e-5)
    assert 0 < learning_rate(paper, 299_999, 300_000) < 1e-9
