"""Sections add up, survive exceptions and start again from zero."""

import pytest

from megatron_kosmos.observability.timers import Timers


def test_sections_accumulate_until_collected() -> None:
    timers = Timers()
    with timers.section("data"):
        pass
    with timers.section("data"), timers.section("step"):
        pass
    first = timers.collect()
    assert list(first) == ["seconds_data", "seconds_step"]
    assert first["seconds_data"] >= first["seconds_step"] > 0
    assert timers.collect() == {}


def test_time_counts_when_the_section_raises() -> None:
    timers = Timers()
    with pytest.raises(RuntimeError), timers.section("save"):
        raise RuntimeError
    assert timers.collect()["seconds_save"] > 0
