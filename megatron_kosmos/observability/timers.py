"""Where a step's wall-clock time goes, by named section."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final, Literal, get_args

from megatron_kosmos.observability.heartbeat import Heartbeat

Section = Literal["data", "wait", "forward_backward", "finalize", "step", "evaluate", "save"]
BETWEEN: Final = "between sections"
SECTIONS: Final[tuple[Section, ...]] = get_args(Section)


class Timers:
    """Seconds spent in each section since the last `collect`.

    A section costs two clock readings. On CUDA it measures the host, which runs ahead of the device until something
    waits for a result: the sections add up to the step, but a kernel's time may show in a later section.
    """

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        """Sections are also told to the `heartbeat`."""
        self._heartbeat = heartbeat or Heartbeat()
        self._seconds: dict[Section, float] = {}

    @contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Add the time inside the `with` block to `name`, also when the block raises."""
        start = perf_counter()
        self._heartbeat.enter(name)
        try:
            yield
        finally:
            self._heartbeat.enter(BETWEEN)
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start

    def collect(self) -> dict[str, float]:
        """Return `{"seconds_<section>": seconds}` of the sections that ran, and start again from zero."""
        collected = {f"seconds_{name}": self._seconds[name] for name in SECTIONS if name in self._seconds}
        self._seconds.clear()
        return collected


class TimeSplit:
    """Where the wall-clock time between two lines of metrics goes; the parts add up to the whole."""

    def __init__(self, timers: Timers) -> None:
        self._timers, self._since = timers, perf_counter()

    def collect(self, num_steps: int) -> dict[str, float]:
        """Return means a step since the last call, over `num_steps`, and each part's share of the whole.

        `seconds_total` is all of the time, evaluation and saves included; `seconds_other` what no section has.
        """
        now = perf_counter()
        total, self._since = now - self._since, now
        seconds = self._timers.collect()
        seconds["seconds_other"] = max(0.0, total - sum(seconds.values()))
        shares = {name.replace("seconds", "share", 1): value / total for name, value in seconds.items()}
        return {name: value / num_steps for name, value in ({"seconds_total": total} | seconds).items()} | shares
