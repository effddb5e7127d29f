"""Sections add up, survive exceptions and start again from zero."""

import pytest

from megatron_kosmos.observability.timers import Timers, TimeSplit


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


def test_the_parts_of_the_time_between_two_lines_add_up_to_it() -> None:
    timers = Timers()
    split = TimeSplit(timers)
    for _ in range(2):
        with timers.section("data"):
            sum(range(10_000))
        sum(range(10_000))
        line = split.collect(num_steps=5)
        seconds = {name: line[f"seconds_{name}"] for name in ("data", "other")}
        assert sum(seconds.values()) == pytest.approx(line["seconds_total"])
        shares = {name: line[f"share_{name}"] for name in ("data", "other")}
        assert shares == pytest.approx({name: value / line["seconds_total"] for name, value in seconds.items()})
        assert min(shares.values()) > 0
