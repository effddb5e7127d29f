"""How long this rank itself computes, without its waits for others: that tells a slow machine from one that waits."""

from time import perf_counter
from typing import Final

import torch

COMPUTING: Final = ("forward-compute", "backward-compute")
"""What megatron-core's schedules call the passes of a microbatch through this rank's chunks."""


class ComputeTimer:
    """Stands where megatron-core's schedules want their `timers`, and adds up forward and backward passes.

    Sending, receiving and the pipeline's bubbles are outside them. Collectives inside are not: the ranks of a tensor
    group, and under ZeRO 2 and 3 the data ranks too, wait for their slowest and take as long as it does. On CUDA the
    device's own clock is read, through events.
    """

    def __init__(self, device: torch.device) -> None:
        self._passes = _CudaPasses() if device.type == "cuda" else _HostPasses()

    def __call__(self, name: str, log_level: int = 0) -> "_Passes":
        """Return what megatron-core starts and stops around the part of a schedule with this name."""
        return self._passes if name in COMPUTING else _IGNORED

    def collect(self) -> float:
        """Return the seconds since the last call. Waits for the device."""
        return self._passes.collect()


class _Passes:
    """Something that is started and stopped; this one measures nothing."""

    def start(self, barrier: bool = False) -> None:
        """Begin."""

    def stop(self, barrier: bool = False) -> None:
        """End what began last."""

    def collect(self) -> float:
        """Return the seconds between, and start again from zero."""
        return 0.0


_IGNORED: Final = _Passes()


class _HostPasses(_Passes):
    def __init__(self) -> None:
        self._started, self._seconds = 0.0, 0.0

    def start(self, barrier: bool = False) -> None:
        self._started = perf_counter()

    def stop(self, barrier: bool = False) -> None:
        self._seconds += perf_counter() - self._started

    def collect(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _CudaPasses(_Passes):
    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def start(self, barrier: bool = False) -> None:
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def stop(self, barrier: bool = False) -> None:
        self.start()

    def collect(self) -> float:
        events, self._events = self._events, []
        if events:
            events[-1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2], strict=True)) / 1000
