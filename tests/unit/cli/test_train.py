"""`kosmos train`: what the command itself refuses."""

from pathlib import Path

import pytest

from megatron_kosmos.cli.train import train


def test_world_size_without_dry_run_is_refused() -> None:
    with pytest.raises(SystemExit, match="--world-size plans for processes that are not there"):
        train([Path("configs/kosmos_tiny.yaml")], world_size=3)


@pytest.mark.parametrize("local_rank, said", [(0, "kosmos train: no tokenizer at nowhere"), (1, 1)])
def test_each_machine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, local_rank: int, said: str | int) -> None:
    """Rank 0, on another machine, may have it."""
    for name, value in (("RANK", 2 + local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as caught:
        train([Path("configs/kosmos_tiny.yaml")], ["data.tokenizer=nowhere"])
    assert str(caught.value.code).startswith(str(said))
