"""Memory that this rank's process holds at most: on its device since the last look, and on its host since its start."""

import resource

import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return peaks in bytes and begin to measure the device's anew.

    `memory_host_peak` is the largest resident set (getrusage). On CUDA, of torch's allocator: `memory_allocated_peak`,
    what tensors hold, and `memory_reserved_peak`, what it has taken from the device. Reads counters; waits for nothing.
    """
    peaks = {"memory_host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks["memory_allocated_peak"] = torch.cuda.max_memory_allocated(device)
        peaks["memory_reserved_peak"] = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    return peaks
