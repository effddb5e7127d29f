"""`kosmos train`: what the command itself refuses."""

from pathlib import Path

import pytest

from megatron_kosmos.cli.train import train


def test_world_size_without_dry_run_is_refused() -> None:
    with pytest.raises(SystemExit, match="--world-size plans for processes that are not there"):
        train([Path("configs/kosmos_tiny.yaml")], world_size=3)
