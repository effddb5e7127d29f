"""Every preset, shrunk to test size, trains the same under every layout: each gradient, losses and norms."""

from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.presets import PRESETS, pattern_of, shrunk
from tests.distributed.test_layouts import LAYOUTS, assert_same, train
from tests.distributed.training import TrainingRecord, train_in_ranks

pytestmark = pytest.mark.distributed


@cache
def one_process(preset: str) -> TrainingRecord:
    return train_in_ranks(1, pattern_of(preset), parallel__zero_stage=0, **shrunk(preset))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_the_same_under_every_layout(preset: str, layout: str) -> None:
    assert_same(train(layout, pattern_of(preset), **shrunk(preset)), one_process(preset))


@pytest.mark.parametrize("layout", ["tp2_sp", "tp4", "pp2_vpp2"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_follows_fp32_in_bf16(preset: str, layout: str) -> None:
    record, reference = (
        train(layout, pattern_of(preset), **shrunk(preset), training__precision="bf16"),
        one_process(preset),
    )
    torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(reference.losses), atol=0.0, rtol=2e-2)
    torch.testing.assert_close(torch.tensor(record.grad_norms), torch.tensor(reference.grad_norms), atol=0.0, rtol=2e-2)


def test_the_presets_differ() -> None:
    """A switch that is not read would leave two presets the same."""
    losses: list[Any] = [one_process(preset).losses[0] for preset in PRESETS]
    assert len({round(loss, 5) for loss in losses}) >= 4, losses
