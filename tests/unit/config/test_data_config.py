"""Settings of the blend: what means nothing is refused, with the setting."""

from typing import Any

import pytest

from megatron_kosmos.config import ConfigError
from megatron_kosmos.config.data import data_step
from tests.distributed.tiny import tiny_run


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("packing", "worst_fit", r"data\.packing: .*'best_fit_decreasing'"),
        ("skip_steps", [[5, 4]], r"skip_steps=\[\[5, 4\]\] must be stretches \[first, last\]"),
        ("skip_steps", [[1, 4], [4, 6]], r"each after the one before; \[4, 6\] is not"),
        ("skip_steps", [[0, 1]], r"data\.skip_steps"),
        ("train", [{"kind": "text", "prefix": "a", "epochs": 0}], r"data\.train\.0\.epochs"),
        ("train", [{"kind": "text", "prefix": "a", "heldout_fraction": 1.0}], r"data\.train\.0\.heldout_fraction"),
        ("heldout", [{"kind": "text", "prefix": "a", "epochs": 2}], r"heldout\.0\.epochs=2 does nothing: only train"),
    ],
)
def test_settings_that_mean_nothing(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(**{f"data__{setting}": value})


def test_skipped_stretches_are_passed_over_one_after_the_other() -> None:
    """In the data's own steps: the second stretch counts what the first passes over."""
    assert [data_step(step, [(2, 3), (6, 6)]) for step in range(6)] == [0, 3, 4, 6, 7, 8]
    assert [data_step(step, [(1, 2), (3, 3)]) for step in range(2)] == [3, 4]
    assert [data_step(step, []) for step in range(3)] == [0, 1, 2]
