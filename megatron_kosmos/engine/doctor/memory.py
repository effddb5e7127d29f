"""What memory of the host this process and its like can still take."""

import os
import shutil
from pathlib import Path

_MEMINFO, _CGROUPS, _SHARED = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/dev/shm")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Return the bytes that are left, of the machine or of the part that a job or container may use (cgroup 2)."""
    return min([_free_of_machine(), *_left_of_cgroups()])


def free_shared_memory() -> int:
    """Return the free bytes of /dev/shm, 0 where there is none."""
    return shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else 0


def _free_of_machine() -> int:
    for line in _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_of_cgroups() -> list[int]:
    """Return what each group above this process has left of its limit."""
    lines = _OWN_CGROUP.read_text().splitlines() if _OWN_CGROUP.exists() else []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    left, folder = [], _CGROUPS / own.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(_CGROUPS):
            break
        try:
            limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        except (OSError, ValueError):
            continue  # the root of the groups has no limit
        if limit != "max":
            # What files it read fill is given back when it is asked for.
            cache = _inactive_file(group)
            left.append(max(0, int(limit) - used + cache))
    return left


def _inactive_file(group: Path) -> int:
    for line in (group / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
